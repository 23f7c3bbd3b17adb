"""What the processes of the tests run: models that generate, alone or over ranks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import farspan
from farspan.runtime.hf.converted import converted_class, converted_config
from farspan.runtime.hf.models import inspect_model

from ..runtime import small_models
from ..runtime.mixed_gate import MixedGate
from ..runtime.pooled_gate import Gate

TWO_LAYERS = {"num_hidden_layers": 2}  # overrides of a case: a third of the collectives less
BLOCK = 8  # tokens that a rank owns at a time at decode: small, so that short answers are spread


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of ``generate``, or of several on one cache.

    lengths: tokens of each row; shorter rows are padded on the left. turns: tokens of further prompts on the
    same cache. how: arguments of generate; patch: of farspan.patch; parallel: of ContextParallel. converted:
    specs of mixers by layer, for a model that has been converted.
    """

    model: str = "llama"
    dtype: torch.dtype = torch.float64
    overrides: dict[str, Any] = field(default_factory=dict)
    converted: dict[int, str] = field(default_factory=dict)
    spec: Any = "dense"
    lengths: tuple[int, ...] = (61,)
    turns: tuple[int, ...] = ()
    new: int = 10
    calls: tuple[int, ...] = ()
    how: dict[str, Any] = field(default_factory=dict)
    patch: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)


_MODELS: dict[str, Any] = {}


def model_of(case: Case) -> Any:
    key = f"{case.model} {case.dtype} {case.overrides} {case.converted}"
    if key not in _MODELS:
        model = small_models.make(case.model, **case.overrides)
        if case.converted:
            model = converted(model, case.converted)
        model = model.to(case.dtype)
        for name, parameter in model.named_parameters():  # recurrent states that last for whole shards
            if name.endswith(("dt_bias", "A_log")):
                torch.nn.init.constant_(parameter, -3.0 if name.endswith("dt_bias") else 0.0)
        _MODELS[key] = model
    return _MODELS[key]


def converted(model: Any, specs: dict[int, str]) -> Any:
    """A converted model with mixers of fresh weights."""
    config = converted_config(inspect_model(model), specs)
    torch.manual_seed(3)
    return converted_class(type(model))(config).eval()


def prompts(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), rows of different lengths padded on the left."""
    draw = torch.Generator().manual_seed(sum(case.lengths))
    longest = max(case.lengths)
    ids = torch.zeros(len(case.lengths), longest, dtype=torch.long)
    for row, length in zip(ids, case.lengths, strict=True):
        row[longest - length :] = torch.randint(3, 128, (length,), generator=draw)
    return ids, (ids != 0).long()


def generated(case: Case, **parallel: Any) -> dict[str, Any]:
    """Tokens, logits and report of a case; ``parallel`` is what patch is given besides."""
    model, (ids, mask) = model_of(case), prompts(case)
    draw = torch.Generator().manual_seed(1)
    how = {"do_sample": False, "max_new_tokens": case.new, "min_new_tokens": case.new} | case.how
    how |= {"return_dict_in_generate": True, "output_logits": True}
    tokens, logits = [], []
    with farspan.patch(model, case.spec, **case.patch, **parallel) as patched:
        past = None
        for turn in (0, *case.turns):
            if turn:
                more = torch.randint(3, 128, (ids.shape[0], turn), generator=draw)
                ids = torch.cat([ids, more], 1)
                mask = torch.cat([mask, torch.ones_like(more)], 1)
            torch.manual_seed(7)
            out = model.generate(ids, attention_mask=mask, past_key_values=past, **how)
            past = out.past_key_values if case.turns else None
            tokens.append(out.sequences)
            logits.append(torch.stack(out.logits, 1))
            if case.turns:
                mask = torch.cat([mask, torch.ones_like(out.sequences[:, ids.shape[1] :])], 1)
                ids = out.sequences
        report = patched.report()
    kept = out.past_key_values
    keys = [getattr(layer, "keys", None) for layer in getattr(kept, "layers", ())]
    rows = None if kept is None else [k.shape[2] for k in keys if k is not None]
    return {"tokens": tokens, "logits": logits, "report": report, "rows": rows, "seen": kept.get_seq_length()}


def over_ranks(group: Any, cases: list[Case]) -> list[dict[str, Any]]:
    """Every case over the ranks of ``group``; memory that nobody has written is full of NaN."""
    torch.use_deterministic_algorithms(True)
    done = []
    for case in cases:
        config = farspan.ContextParallel(mesh=group, **({"block": BLOCK} | case.parallel))
        done.append(generated(copy.deepcopy(case), parallel=config))
    return done


def random_ids(case: Case) -> torch.Tensor:
    """Tokens enough for all of a case's plain calls."""
    draw = torch.Generator().manual_seed(5)
    return torch.randint(3, 128, (len(case.lengths), sum(map(abs, case.calls))), generator=draw)


def stepped(case: Case, **parallel: Any) -> dict[str, Any]:
    """The logits of a case's plain calls on one cache, and how many rows each layer keeps in the end."""
    model = model_of(case)
    ids = random_ids(case)
    cache = DynamicCache(config=model.config.get_text_config())
    logits, at = [], 0
    with farspan.patch(model, case.spec, **case.patch, **parallel) as patched, torch.no_grad():
        for n in case.calls:
            if n < 0:
                cache.crop(n)
                at += n
                continue
            logits.append(model(ids[:, at : at + n], past_key_values=cache).logits)
            at += n
        report = patched.report()
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    rows = [k.shape[2] for k in keys if k is not None]
    return {"logits": logits, "rows": rows, "seen": cache.get_seq_length(), "report": report}


def stepped_over_ranks(group: Any, cases: list[Case]) -> list[dict[str, Any]]:
    """The same over the ranks of ``group``."""
    torch.use_deterministic_algorithms(True)
    return [
        stepped(case, parallel=farspan.ContextParallel(mesh=group, **({"block": BLOCK} | case.parallel)))
        for case in cases
    ]


def other_gates_over_ranks(group: Any) -> str:
    """The sentence in which ``patch`` ends where rank 1 has other weights in its gates."""
    first = Gate.__init__

    def other(self: Gate, *args: Any) -> None:
        first(self, *args)
        with torch.no_grad():
            self.k[0, 0] += group.rank() == 1

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(Gate, "__init__", other)
        try:
            generated(
                Case(spec=MixedGate(), overrides=TWO_LAYERS), parallel=farspan.ContextParallel(mesh=group)
            )
        except farspan.FarspanError as error:
            return str(error)
    return "nothing was refused"


def refused_over_ranks(group: Any, case: Case) -> str:
    """The sentence in which the plain calls of a case end."""
    try:
        stepped_over_ranks(group, [case])
    except farspan.FarspanError as error:
        return str(error)
    return "nothing was refused"
