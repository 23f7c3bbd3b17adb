"""What the processes of test_masks.py run: plain calls with masks and positions of every kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import farspan

from ..runtime import small_models

LENGTH = 60


@dataclass(frozen=True, kw_only=True)
class Call:
    """how: arguments of the model besides the tokens of two rows; late: what its config is set to
    once it is patched. refused: a part of the sentence that the call ends in on one device; None: it runs."""

    how: dict[str, Any] = field(default_factory=dict)
    late: dict[str, Any] = field(default_factory=dict)
    spec: str = "dense"
    model: str = "llama"
    refused: str | None = None


def answered(calls: list[Call], parallel: Any = None) -> list[Tensor | str]:
    """By call the logits of its tokens, or the sentence that it ended in."""
    ids, done = small_models.prompt(2, LENGTH), []
    for call in calls:
        model = small_models.make(call.model).double()
        with farspan.patch(model, call.spec, parallel=parallel), torch.no_grad():
            for name, value in call.late.items():
                setattr(model.config, name, value)
            try:
                logits = model(ids, **call.how).logits
                mask = call.how.get("attention_mask")
                done.append(logits if mask is None else logits[mask.bool()])
            except farspan.FarspanError as error:
                done.append(str(error))
    return done


def answered_over_ranks(group: Any, calls: list[Call]) -> list[Tensor | str]:
    """The same over the ranks of ``group``."""
    return answered(calls, farspan.ContextParallel(mesh=group, block=8))


def with_another_dtype(group: Any) -> str:
    """What patch says where rank 1 has the model in another dtype."""
    dtype = torch.bfloat16 if torch.distributed.get_rank(group) == 1 else torch.float32
    try:
        farspan.patch(small_models.make("llama").to(dtype), parallel=farspan.ContextParallel(mesh=group))
    except farspan.FarspanError as error:
        return str(error)
    return ""
