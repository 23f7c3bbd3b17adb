"""Prompts that reuse the caches of earlier ones over ranks: each rank keeps its part."""

from __future__ import annotations

from .jobs import TWO_LAYERS, Case
from .jobs_reading import read, read_over_ranks
from .world import World

CASES = [
    Case(new=4, overrides=TWO_LAYERS),
    Case(new=4, overrides=TWO_LAYERS, spec="block_topk:k=32,block=16 + quest:k=16,page=4,dense_layers=0"),
    Case(new=4, overrides=TWO_LAYERS, converted={1: "gated_linear"}),
    Case(new=4, overrides=TWO_LAYERS, model="falcon_h1"),
    Case(new=4, model="gemma3"),
]


def test_as_on_one_device(world: World) -> None:
    """The answers are those without reuse, and as much is reused as on one device."""
    ranks = world.run(read_over_ranks, 2, CASES, 10**9)
    for case, *done in zip(CASES, *ranks, strict=True):
        answers, reused = read(case, None).answers, read(case, 10**9).reused
        assert sum(reused) >= 53 and all(one.answers == answers for one in done), case
        assert all(one.reused == reused for one in done), case
        assert len({one.nbytes for one in done}) == 1, "every rank counts the bytes of the largest part"


def test_ranks_drop_the_same_caches(world: World) -> None:
    [case], [[whole], _] = CASES[:1], world.run(read_over_ranks, 2, CASES[:1], 10**9)
    first, second = (done for [done] in world.run(read_over_ranks, 2, [case], whole.nbytes * 2 // 3))
    assert first == second and first.dropped > 0 and first.answers == whole.answers


def test_a_rank_that_has_lost_a_cache(world: World) -> None:
    """All ranks then read the prompt whole, and go on with stores that are alike."""
    [case], answers = CASES[:1], read(CASES[0], None).answers
    for [done] in world.run(read_over_ranks, 2, [case], 10**9, 1):
        assert done.answers == answers and done.reused[:3] == [0, 0, 40]
