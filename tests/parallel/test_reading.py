"""Prompts that reuse the caches of earlier ones over ranks: each rank keeps its part."""

from __future__ import annotations

import torch

from .jobs import Case
from .jobs_reading import read, read_over_ranks
from .world import World

NEW = {"new": 4}
CASES = [
    Case(**NEW),
    Case(spec="block_topk:k=32,block=16 + quest:k=16,page=4,dense_layers=0", **NEW),
    Case(model="qwen3_next", dtype=torch.float32, **NEW),
    Case(model="falcon_h1", **NEW),
    Case(model="gemma3", **NEW),
    Case(converted={1: "gated_linear"}, **NEW),
]


def test_as_on_one_device(world: World) -> None:
    """The tokens are those without reuse, and as much is reused as on one device."""
    ranks = world.run(read_over_ranks, 2, CASES, 10**9)
    for i, case in enumerate(CASES):
        whole, _, _ = read(case, None)
        alone, _, _ = read(case, 10**9)
        print(case.model, case.spec, [x for _, x in alone], [[x for _, x in done[i][0]] for done in ranks])
        for done, nbytes, _ in (rank[i] for rank in ranks):
            assert [tokens for tokens, _ in done] == [tokens for tokens, _ in whole], case
            assert [count for _, count in done] == [count for _, count in alone], case
            assert nbytes == ranks[0][i][1], "every rank counts the bytes of the largest part"


def test_a_rank_that_has_lost_a_cache(world: World) -> None:
    """All ranks then read the prompt whole, and go on with stores that are alike."""
    [case], whole = CASES[:1], read(CASES[0], None)[0]
    for done, _, _ in (rank[0] for rank in world.run(read_over_ranks, 2, [case], 10**9, 1)):
        assert [tokens for tokens, _ in done] == [tokens for tokens, _ in whole]
        assert [count for _, count in done][:3] == [0, 0, 40]
