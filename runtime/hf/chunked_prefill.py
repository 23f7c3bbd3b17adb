"""Chunked prefill: a long call of the decoder runs as several shorter ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...attention.errors import FarspanError
from ..chunking import Chunking
from ..padding import read_padding
from ..session import Session
from .decoder_call import tokens_of
from .decoder_over_ranks import ALONG_TOKENS, along_tokens, foreign_tensors, tensors_in
from .hooks import replace_forward
from .releases import given_cache


def chunk_forward(decoder: Any, chunking: Chunking, session: Session) -> Callable[[], None]:
    """Make the decoder run a long call as several shorter calls, cut by ``chunking``. Returns the undo
    step."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tokens = tokens_of(kwargs)
        length = 0 if tokens is None else tokens.shape[1]
        if tokens is None or chunking.fits(length) or session.off:
            return original(*args, **kwargs)
        cache, reason = given_cache(kwargs), _left_whole(decoder, kwargs)
        if chunking.by_prompt and session.ends is not None:
            reason = reason or "rows padded on the right end in different chunks"
        if cache is None or reason is not None:
            session.notice(f"prefill_chunk did not cut it: {reason or 'it keeps no KV cache'}")
            return original(*args, **kwargs)
        past = cache.get_seq_length()
        cuts = chunking.cuts(_row_starts(kwargs.get("attention_mask"), past, length), length)
        _notice_uncut_end(length - max([0, *cuts]), chunking, session)
        if not cuts:
            return original(*args, **kwargs)
        parts = list(zip([0, *cuts], [*cuts, length], strict=True))
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + length, device=tokens.device)[None]
        outputs = []
        with session.part_of(positions):
            for a, b in parts:
                part = dict(kwargs)
                for name in ALONG_TOKENS:
                    if part.get(name) is not None:
                        part[name] = along_tokens(name, part[name], partial(_narrow, a, b))
                if part.get("attention_mask") is not None:
                    part["attention_mask"] = part["attention_mask"][:, : past + b]
                outputs.append(original(*args, **part))
        output = outputs[-1]
        # Over ranks, hidden states are returned only for the last ``session.logits_to_keep`` tokens.
        sizes = [{b - a, min(b - a, session.logits_to_keep or b - a)} for a, b in parts]
        for name in list(output):
            output[name] = _joined(name, [part[name] for part in outputs], sizes)
        return output

    return replace_forward(decoder, forward)


def _row_starts(mask: Tensor | None, past: int, length: int) -> list[int]:
    """For each row, the token of the call at which the row begins. mask: covers the ``length`` tokens of the
    call and the ``past`` tokens before it."""
    if mask is None:
        return [0]
    starts = read_padding(mask[:, : past + length]).starts
    return [0] if starts is None else [max(first - past, 0) for first in starts]


def _notice_uncut_end(rest: int, chunking: Chunking, session: Session) -> None:
    """Give a notice, and once a warning, where the last ``rest`` tokens of a padded batch exceed a chunk."""
    if chunking.fits(rest):
        return
    session.notice(
        "prefill_chunk did not cut its end: no cut fits every row of this left-padded batch",
        f"prefill_chunk={chunking.tokens} is exceeded in this left-padded batch: {rest} tokens run in one "
        f"call, because cuts must lie at multiples of {chunking.step} tokens in every row. Pass rows of one "
        "length, or one row at a time."
        + (" The results are those without prefill_chunk." if chunking.by_prompt else ""),
    )


def _left_whole(decoder: Any, kwargs: dict[str, Any]) -> str | None:
    """The reason why a call must not be cut; None where it may be."""
    if torch.is_grad_enabled() and _needs_gradients(decoder, kwargs):
        return "it needs gradients (torch.no_grad() avoids that)"
    if foreign := foreign_tensors(decoder.config, kwargs):
        return f"{', '.join(dict.fromkeys(foreign))} may not lie along the tokens"
    return None


def _needs_gradients(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether gradients flow through a call: to the weights of the decoder, its arguments or cached keys."""
    layers = getattr(given_cache(kwargs), "layers", ())
    cached = [[getattr(layer, "keys", None), getattr(layer, "values", None)] for layer in layers]
    return any(x.requires_grad for x in chain(decoder.parameters(), tensors_in(kwargs), tensors_in(cached)))


def _narrow(a: int, b: int, x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, a, b - a)


def _joined(name: str, parts: list[Any], sizes: list[set[int]]) -> Any:
    """One entry of the decoder's output for the whole call. Tensors [B, T, ...] are joined along the tokens;
    of any other entry the value of the last part is taken. sizes: the values of T that each part may have."""
    if isinstance(parts[0], tuple | list):
        return tuple(_joined(name, list(each), sizes) for each in zip(*parts, strict=True))
    if not isinstance(parts[0], Tensor):
        return parts[-1]
    if any(x.dim() < 2 or x.shape[1] not in size for x, size in zip(parts, sizes, strict=True)):
        raise FarspanError(
            f"The output {name!r} of the chunks of a prompt cannot be joined, because it does not lie along "
            "the tokens: patch without prefill_chunk."
        )
    return torch.cat(parts, 1)
