"""State passing: mixers over contiguous shards, against the same mixers on one device."""

from __future__ import annotations

import pytest
import torch

from .jobs_states import call_of, masks, mixers, passed
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
