"""State passing: mixers over contiguous shards, against the same mixers on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .jobs import Case
from .jobs_states import Convolved, call_of, masks, mixers, passed
from .test_generate import assert_same
from .world import World

CALLS = [(0, 21, 1), (0, 2, 1), (5, 1, 1), (7, 30, 8), (0, 17, 16)]  # past, length, block multiple


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", mixers())
def test_passed_states_are_those_of_one_device(name: str, size: int, world: World):
    """Lengths that do not divide, empty shards, shards shorter than the halo, rows that are all padding in a
    shard, and a past."""
    mixer = mixers()[name]
    for past, length, multiple in CALLS:
        ranks = world.run(passed, size, name, past, length, multiple)
        hidden, cos = call_of(mixer, past, past + length)
        for kind, mask in masks(length).items():
            with torch.no_grad():
                state = mixer(hidden[:, :past], None, None, (cos[:, :past],) * 2)[1] if past else None
                want, after = mixer(hidden[:, past:], state, mask, (cos[:, past:],) * 2)
            real = torch.ones(3, length, dtype=torch.bool) if mask is None else mask
            for rank, found in enumerate(ranks):
                out, end, _ = found[kind]
                where = f"rank {rank} of {size}, {past} + {length} tokens, padding {kind}"
                assert torch.allclose(out[real], want[real], rtol=0, atol=1e-12), where
                for a, b, first in zip(end, after, ranks[0][kind][1], strict=True):
                    assert torch.allclose(a, b, rtol=0, atol=1e-12), where
                    assert torch.equal(a, first), f"not the bits of rank 0: {where}"


def patched(rule: str, **more: Any) -> dict[str, Any]:
    """Options of patch: two of the three layers have a mixer."""
    return {"mixers": {0: Convolved(rule=rule).double(), 2: Convolved(rule=rule, seed=1).double()}, **more}


def test_generate_with_mixers_is_that_of_one_device(world: World):
    """Beside dense and sparse attention: padded batches, several turns, chunked prefill, beams, short
    prompts, and lengths that leave a rank without tokens."""
    beams = {"num_beams": 3, "num_return_sequences": 2}
    sparse = "block_topk:k=32,block=16 + quest:k=32"
    cases = [
        Case(lengths=(61,), patch=patched("delta")),
        Case(lengths=(70, 41, 2), turns=(20, 1), new=4, patch=patched("head")),
        Case(lengths=(90, 57), new=4, patch=patched("channel", prefill_chunk=24)),
        Case(lengths=(61, 30), new=4, how=beams, patch=patched("head")),
        Case(lengths=(9,), turns=(30,), new=3, patch=patched("delta")),
        Case(lengths=(121, 80), new=4, spec=sparse, patch=patched("head")),
        Case(lengths=(33,), new=3, spec="block_topk:k=32,block=16", patch=patched("head")),
    ]
    ranks = assert_same(world, (2, 3, 4), cases, 1e-9)
    for report in (done[0]["report"] for done in ranks):
        assert {"halo", "transitions"} <= report.traffic.keys()
