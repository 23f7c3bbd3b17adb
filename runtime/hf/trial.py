"""The trial of a model: a short run of a small copy of it, patched and unpatched.

models.py first decides by config and source whether a model can be served. Only a run shows that the decoder
accepts farspan's cache, that masks and attention modules work as expected, and that a new release of
transformers has changed none of this.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...attention.attend import DECODE_ROWS
from ...attention.dense import Dense
from ...attention.errors import Unsupported
from ..layer import Layer
from ..session import Session
from . import releases
from .install import install
from .interface import ATTRIBUTE
from .models import FULL, HYBRID, SLIDING, ModelInfo, inspect_model
from .tiny import TOKENS, alone, own_class, owner, small_copies

_PROMPT = DECODE_ROWS + 8  # tokens; more than a decode step and than the sliding windows of the copy have
_PIECES = (0, 20, 40, 60)  # the cuts of a prompt, for the test that layers continue exactly
_ROUNDING = 8  # allowed multiple of the effect of rounding; correct models had up to 2, faults above 1,000
_LONGEST = 200  # characters of an error of the model that are quoted


@dataclass(frozen=True)
class Trial:
    """The result of a trial. reasons: why the model cannot be served; empty where it can. foreign_keys:
    whether attention is called with keys that are not those of the cache, so that every call is a prefill."""

    reasons: tuple[str, ...] = ()
    foreign_keys: bool = False


def check_by_trial(info: ModelInfo) -> Trial:
    """Run the trial of a model whose class the tests do not cover, or of any model under an untested release
    of transformers.

    Raises Unsupported, with reasons, where the small copy fails or computes something else under farspan.
    Where no small copy runs unpatched, the model is accepted; an untested release then gives a warning.
    """
    newer, kind = releases.newer_than_tested(), type(info.model).__name__
    if not newer and releases.is_tested(own_class(owner(info))):
        return Trial()
    trial = try_out(info)
    untested = f"transformers {releases.installed()} is newer than any tested (up to {releases.TESTED[-1]})"
    if trial is None:
        if newer:
            warnings.warn(
                f"{untested}, and no small copy of {kind} could be run to check it: install "
                f"{releases.tested_requirement()!r} if its results look wrong.",
                stacklevel=3,
            )
        return Trial()
    if trial.reasons and newer:
        raise Unsupported(
            f"farspan cannot patch {kind}",
            [*trial.reasons, f"{untested}, so install {releases.tested_requirement()!r}"],
        )
    if trial.reasons:
        raise Unsupported(f"farspan cannot patch {kind}", trial.reasons)
    return trial


def try_out(info: ModelInfo) -> Trial | None:
    """Run a small copy of the model, patched (dense) and unpatched; None where no copy runs unpatched. The
    result is kept in the process for each class and config."""
    return _once(_try_out, info)


def continues_exactly(info: ModelInfo) -> bool:
    """Whether the model computes the same for a prompt in several calls as for the whole prompt in one call.

    Attention does. Other layers (a recurrence, a convolution) are tested on a small copy; the result is kept
    in the process for each class and config. Where no copy runs, the answer is False.
    """
    attention = {FULL, SLIDING}.issuperset(info.kinds) and len(info.attention) == len(info.kinds)
    return attention or _once(_continues, info)


_done: dict[tuple[Any, ...], Any] = {}


def _once(find: Callable[[ModelInfo], Any], info: ModelInfo) -> Any:
    try:
        key = (find, own_class(owner(info)), repr(owner(info).config.to_dict()))
    except Exception:  # a config of any author may raise anything
        return find(info)
    if key not in _done:
        _done[key] = find(info)
    return _done[key]


def _try_out(info: ModelInfo) -> Trial | None:
    with alone():
        ids, mask = _batch(_PROMPT + 2)
        for small in small_copies(info):
            try:
                fresh = copy.deepcopy(small)  # some models keep state of their last call
                copied, expected = inspect_model(fresh), _outputs(small, ids, mask)
                rounding = _rounding(small, lambda model: _steps(model, ids, mask), expected[0])
                if not math.isfinite(rounding):
                    continue
            except Exception:  # a class of any author may raise anything at such small sizes
                continue
            return _compare(copied, ids, mask, expected, rounding)
    return None


def _continues(info: ModelInfo) -> bool:
    with alone():
        ids, mask = _batch(_PIECES[-1])
        for small in small_copies(info):
            try:
                whole, pieces = run(small, ids, mask, (0, _PIECES[-1])), run(small, ids, mask, _PIECES)
                rounding = _rounding(small, lambda model: run(model, ids, mask, (0, _PIECES[-1])), whole)
            except Exception:  # as above
                continue
            return _difference(pieces, whole) <= rounding
    return False


def _batch(length: int) -> tuple[Tensor, Tensor]:
    """Two rows of tokens, one of them padded on the left: ids and mask [2, length]."""
    ids = torch.randint(TOKENS.start, TOKENS.stop, (2, length))
    mask = torch.ones_like(ids)
    ids[1, : length // 3] = mask[1, : length // 3] = 0
    return ids, mask


def run(model: Any, ids: Tensor, mask: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Logits (or hidden states) [B, T, ...] of a sequence in several calls, from cut to cut; 0 at padding."""
    cache, parts = None, []
    for a, b in itertools.pairwise(cuts):
        how = {"input_ids": ids[:, a:b], "attention_mask": mask[:, :b], "use_cache": True}
        if a and "position_ids" in inspect.signature(type(model).forward).parameters:
            how["position_ids"] = torch.arange(a, b).expand(len(ids), -1)  # Bamba counts from 0 without them
        output = model(**how, **releases.with_cache(model, cache))
        if cache is None and releases.returned_cache(output) is None:
            # RecurrentGemma does not return the cache that it makes, so it is called with one.
            cache = DynamicCache(config=model.config)
            output = model(**how, **releases.with_cache(model, cache))
        given_back = releases.returned_cache(output)
        cache = cache if given_back is None else given_back
        parts.append(output[0])
    return torch.cat(parts, 1).float() * mask[..., None]


def _steps(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return run(model, ids, mask, (0, _PROMPT, _PROMPT + 1, _PROMPT + 2))


def _outputs(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a prompt and two decode steps, and the tokens of ``generate``; for a model without
    ``generate``, the tokens of the prompt."""
    logits = _steps(model, ids, mask)
    if not model.can_generate():
        return logits, ids
    how = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return logits, model.generate(input_ids=ids, attention_mask=mask, **how)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, divided by the largest absolute value of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


def _rounding(model: Any, outputs: Callable[[Any], Tensor], expected: Tensor) -> float:
    """The allowed difference by rounding: a multiple of the difference that a random change of every weight
    by about half a unit in its last place makes."""
    changed = copy.deepcopy(model)
    for weight in changed.parameters():
        weight.mul_(1 + torch.randn_like(weight) * torch.finfo(weight.dtype).eps / 2)
    return _ROUNDING * _difference(outputs(changed), expected)


def _compare(
    info: ModelInfo, ids: Tensor, mask: Tensor, expected: tuple[Tensor, Tensor], rounding: float
) -> Trial:
    session = Session(strict=False)
    reached: set[int] = set()
    foreign: set[int] = set()

    def watched(layer: Layer, q: Tensor, k: Tensor, *args: Any) -> Tensor:
        reached.add(layer.index)
        store = None if session.stores is None else session.stores[layer.index]
        if info.kinds[layer.index] in (FULL, HYBRID) and not (store is not None and store.holds(k)):
            foreign.add(layer.index)
        return layer(q, k, *args)

    layers = {i: Layer(i, Dense(), Dense(), session) for i in info.attention}
    undo = install(info.model, info, layers, session, None)
    try:
        for index, module in info.attention.items():
            setattr(module, ATTRIBUTE, functools.partial(watched, layers[index]))
        logits, tokens = _outputs(info.model, ids, mask)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:_LONGEST]
        return Trial((f"a short call of a small copy of it fails under farspan ({reason})",))
    finally:
        for step in reversed(undo):
            step()
    reasons = []
    if left := sorted(set(layers) - reached):
        reasons.append(f"layers {left} of a small copy of it do not call farspan's attention")
    if not (off := _difference(logits, expected[0])) <= rounding:
        reasons.append(f"a small copy of it computes other logits under farspan (a difference of {off:.0%})")
    elif not torch.equal(tokens, expected[1]):
        reasons.append("a small copy of it generates other tokens under farspan")
    return Trial(tuple(reasons), bool(foreign))
