"""Training over ranks: gradients averaged over the ranks are those of one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

import farspan

from .jobs import Case, model_of, prompts
from .world import World

SPARSE = "block_topk:k=32,block=16"


def gradients(case: Case, **parallel: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of a copy of the case's model, in training mode."""
    model = copy.deepcopy(model_of(case)).train()
    ids, mask = prompts(case)
    labels = ids.masked_fill(mask == 0, -100)
    checkpointing = case.how.get("gradient_checkpointing")
    if checkpointing:
        model.gradient_checkpointing_enable()
    with farspan.patch(model, case.spec, **parallel):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def averaged(group: Any, cases: list[Case]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The same over the ranks of ``group``, with gradients averaged as data parallelism does it."""
    done = []
    for case in cases:
        config = farspan.ContextParallel(mesh=group, **case.parallel)
        loss, grads = gradients(case, parallel=config)
        for grad in grads.values():
            dist.all_reduce(grad, group=group)
            grad /= dist.get_world_size(group)
        done.append((loss, grads))
    return done


@pytest.mark.parametrize("mechanism", ["gather", "ring", "ulysses"])
def test_gradients_as_on_one_device(mechanism: str, world: World):
    common: dict[str, Any] = {"parallel": {"mechanism": mechanism}, "overrides": {"num_key_value_heads": 4}}
    cases = [
        Case(lengths=(93,), **common),
        Case(lengths=(17, 130), **common),  # padded; some ranks have little but split padding
        Case(lengths=(130, 101), spec=SPARSE, **common),
        Case(lengths=(40,), spec=SPARSE, **common),  # fewer blocks than ranks: some have only split padding
        Case(lengths=(93,), how={"gradient_checkpointing": True}, **common),
    ]
    for size in (2, 4):
        ranks = world.run(averaged, size, cases)
        for i, case in enumerate(cases):
            loss, want = gradients(case)
            for rank, (got_loss, got) in enumerate(done[i] for done in ranks):
                where = f"rank {rank} of {size}, {case}"
                assert abs(got_loss - loss) < 1e-9, where
                assert got.keys() == want.keys()
                for name, grad in want.items():
                    error = (got[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-6)
                    assert error < 1e-8, f"{name} differs by {error:.1e}: {where}"
