"""Backward through every mechanism gives the gradients of one device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from . import jobs_mechanisms as jobs
from .jobs_mechanisms import Case
from .test_mechanisms import with_mechanisms
from .world import World

CASES = [
    Case(new=3),  # fewer tokens than ranks: a rank with nothing but split padding takes part in backward
    Case(new=61, heads=(6, 3), dims=(8, 4)),
    Case(new=257, heads=(4, 1), softcap=3.0),
    Case(new=61, past=61, heads=(8, 8), starts=(0, 70, 31)),
]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gradients_equal_those_of_one_device(world: World, size: int):
    """dq, dk, dv, and those of stored keys and values, through out and lse."""
    cases = [*CASES, replace(CASES[1], dtype=torch.float32)]
    world.run(jobs.gradients, size, with_mechanisms(cases, size))


@pytest.mark.parametrize("size", [1, 3])
def test_differentiable_gather(world: World, size: int):
    world.run(jobs.gathered_gradient, size)
