"""Masks and positions over ranks: refused in the sentence of one device, or served as on one device."""

from __future__ import annotations

import pytest
import torch

from .jobs_masks import LENGTH, Call, answered, answered_over_ranks, with_another_dtype
from .world import World

UP = torch.arange(LENGTH)
BLOCKS = "block_topk:k=16,block=8"


def positions(*rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"position_ids": torch.stack(rows)}


def mask(*zeros: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Ones but for (row, from, to)."""
    ones = torch.ones(2, LENGTH, dtype=torch.long)
    for row, start, end in zeros:
        ones[row, start:end] = 0
    return {"attention_mask": ones}


ALONE = {"use_cache": False}
RESTARTING, REPEATED = torch.arange(30).repeat(2), torch.arange(30).repeat_interleave(2)
PACKED = "packed sequences"
CALLS = {
    "restarting": Call(how=positions(RESTARTING) | ALONE, refused=PACKED),
    "restarting in one row": Call(how=positions(UP, RESTARTING) | ALONE, refused=PACKED),
    "repeated": Call(how=positions(REPEATED) | ALONE, refused=PACKED),
    "reversed": Call(how=positions(UP.flip(0)) | ALONE, refused=PACKED),
    "with a gap": Call(how=positions(torch.cat([UP[:30], UP[30:] + 7])) | ALONE, refused=PACKED),
    "restarting, sparse": Call(how=positions(RESTARTING) | ALONE, spec=BLOCKS, refused=PACKED),
    "restarting, sliding layers": Call(how=positions(RESTARTING) | ALONE, model="gemma2", refused=PACKED),
    "not causal by config": Call(late={"is_causal": False}, refused="is_causal=False"),
    "not causal by argument": Call(how={"is_causal": False}, refused="is_causal=False"),
    "bidirectional by config": Call(
        model="gemma3", late={"use_bidirectional_attention": True}, refused="is_causal=False"
    ),
    "4-D": Call(how={"attention_mask": torch.zeros(2, 1, LENGTH, LENGTH)}, refused="got a 4-D one"),
    "3-D": Call(how={"attention_mask": torch.ones(2, LENGTH, LENGTH)}, refused="got a 3-D one"),
    "too short": Call(how={"attention_mask": torch.ones(2, LENGTH - 1)}, refused="is [2, 59] where [2, 60]"),
    "holes": Call(how=mask((1, 5, 8)), refused="zeros between ones in row 1"),
    "right, last logits": Call(how=mask((1, 50, 60)) | {"logits_to_keep": 1}, refused="padding on the right"),
    "plain": Call(),
    "plain, no cache": Call(how=ALONE),
    "counting up": Call(how=positions(UP + 5) | ALONE),
    "of two rows": Call(how=positions(UP, UP + 9) | ALONE, spec=BLOCKS),
    "restarting on a cache": Call(how=positions(RESTARTING)),  # one text, as transformers reads it
    "restarting under a mask": Call(how=positions(RESTARTING) | mask() | ALONE),
    "left": Call(how=mask((1, 0, 13)) | ALONE, spec=BLOCKS),
    "right": Call(how=mask((1, 50, 60)), spec="window:w=12"),
    "right, sliding layers": Call(how=mask((0, 50, 60), (1, 0, 7)) | ALONE, model="gemma2"),
}


@pytest.mark.parametrize("size", [2, 3])
def test_as_on_one_device(world: World, size: int):
    calls = list(CALLS.values())
    alone = answered(calls)
    for rank, done in enumerate(world.run(answered_over_ranks, size, calls)):
        for name, want, got in zip(CALLS, alone, done, strict=True):
            refused, where = CALLS[name].refused, f"{name}, rank {rank} of {size}"
            if refused is not None:
                assert isinstance(want, str) and refused in want, where
                assert got == want, where
            else:
                assert isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor), (where, want, got)
                assert (got - want).abs().max() < 1e-9, where


def test_padding_on_the_right_that_would_select_is_refused(world: World):
    calls = [
        Call(how=mask((1, 50, 60)), spec=BLOCKS),
        Call(how=positions(UP, UP.clamp(max=49)), spec=BLOCKS),
    ]
    assert all(isinstance(done, torch.Tensor) for done in answered(calls))
    told = ("zeros after ones in row 1", "positions stand still in row 1")
    for done in world.run(answered_over_ranks, 2, calls):
        for said, part in zip(done, told, strict=True):
            assert isinstance(said, str) and part in said
            assert f"over ranks the padding would change what {BLOCKS} selects" in said


def test_another_dtype_on_a_rank(world: World):
    for said in world.run(with_another_dtype, 2):
        assert "the dtype of the model on rank 1" in said
