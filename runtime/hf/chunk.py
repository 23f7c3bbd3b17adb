"""Chunked prefill: a long call of the decoder runs as several shorter ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..layer import DECODE_ROWS
from .releases import given_cache
from .spread import ALONG_TOKENS, along_tokens, foreign_tensors, replace_forward


def chunk_forward(decoder: Any, chunk: int) -> Callable[[], None]:
    """Let a long call run as several of ``chunk`` tokens; the last takes a short rest along, so that it is no
    decode step. Returns the undo step."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tokens = (
            kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        )
        cache = given_cache(kwargs)
        length = 0 if tokens is None else tokens.shape[1]
        if cache is None or length <= chunk + DECODE_ROWS or foreign_tensors(decoder.config, kwargs):
            return original(*args, **kwargs)
        past = cache.get_seq_length()
        cuts = list(range(chunk, length, chunk))
        if length - cuts[-1] <= DECODE_ROWS:
            cuts.pop()
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


def _narrow(a: int, b: int, x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, a, b - a)
