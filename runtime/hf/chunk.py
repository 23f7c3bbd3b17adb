"""Chunked prefill: a long call of the decoder runs as several shorter ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cuts import Chunking
from ..layer import read_padding
from .models import FULL
from .spread import ALONG_TOKENS, along_tokens, foreign_tensors, replace_forward


def chunk_forward(decoder: Any, chunking: Chunking) -> Callable[[], None]:
    """Let a long call run as several, cut by ``chunking``. Returns the undo step."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tokens = (
            kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        )
        cache = kwargs.get("past_key_values")
        length = 0 if tokens is None else tokens.shape[1]
        if cache is None or chunking.fits(length) or foreign_tensors(decoder.config, kwargs):
            return original(*args, **kwargs)
        past = cache.get_seq_length()
        cuts = chunking.cuts(_begins(kwargs.get("attention_mask"), past, length), length)
        if not cuts:
            return original(*args, **kwargs)
        outputs = []
        for a, b in zip([0, *cuts], [*cuts, length], strict=True):
            part = dict(kwargs)
            for name in ALONG_TOKENS:
                if part.get(name) is not None:
                    part[name] = along_tokens(name, part[name], partial(_narrow, a, b))
            if part.get("attention_mask") is not None:
                part["attention_mask"] = part["attention_mask"][:, : past + b]
            outputs.append(original(*args, **part))
        output = outputs[-1]
        output.last_hidden_state = torch.cat([part.last_hidden_state for part in outputs], 1)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(
                torch.cat(layer, 1) for layer in zip(*(part.hidden_states for part in outputs), strict=True)
            )
        return output

    return replace_forward(decoder, forward)


def _begins(mask: Any, past: int, length: int) -> list[int]:
    """At which of the call's ``length`` tokens rows begin, by a mask of these and the ``past`` ones."""
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return [0]
    starts = read_padding(mask[:, : past + length]).starts
    return [0] if starts is None else [max(first - past, 0) for first in starts]


def _narrow(a: int, b: int, x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, a, b - a)
