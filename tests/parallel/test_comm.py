"""The collectives give what they say and count what they send."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farspan.parallel.group.comm import Ranks, pack, unpack

from .world import World


def collectives(group: Any) -> dict[str, Any]:
    ranks = Ranks(group)
    r, p = ranks.rank, ranks.size
    mine = torch.arange(6, dtype=torch.bfloat16).view(2, 3) + 10 * r
    gathered = ranks.all_gather(mine)
    assert torch.equal(
        gathered, torch.stack([torch.arange(6).view(2, 3) + 10 * i for i in range(p)]).bfloat16()
    )
    summed = ranks.reduce_scatter(torch.arange(p * 2.0).view(p, 2) * (r + 1))
    assert torch.equal(summed, torch.arange(p * 2.0).view(p, 2)[r] * (p * (p + 1) // 2))
    send = [(r + i) % 3 for i in range(p)]  # uneven, some nothing
    receive = [(i + r) % 3 for i in range(p)]
    out = ranks.all_to_all(torch.full((sum(send), 4), float(r)), send, receive)
    assert out[:, 0].tolist() == [float(i) for i in range(p) for _ in range(receive[i])]
    assert ranks.broadcast(torch.tensor([r]), p - 1).item() == p - 1
    into = torch.empty(2, 3, dtype=torch.bfloat16)
    ranks.shift(mine, into).wait()
    assert torch.equal(into, torch.arange(6).view(2, 3).bfloat16() + 10 * ((r - 1) % p))
    return {"sent": dict(ranks.sent), "rank": r, "to_others": sum(send) - send[r]}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives_and_their_bytes(world: World, size: int):
    for rank, got in enumerate(world.run(collectives, size)):
        assert got["rank"] == rank
        assert got["sent"] == {
            "all_gather": (size - 1) * 12,
            "reduce_scatter": (size - 1) * 8,
            "all_to_all": got["to_others"] * 16,
            "broadcast": (size - 1) * 8 if rank == size - 1 else 0,
            "shift": 12 if size > 1 else 0,
        }


def test_pack_round_trip():
    whole = [torch.randn(3, 5), torch.randn(2, 2, 3).bfloat16(), torch.arange(3), torch.tensor([True])]
    buffers = torch.stack([pack(*whole), pack(*[w.clone() for w in whole])])
    for before, after in zip(whole, unpack(buffers, *whole), strict=True):
        assert torch.equal(after, torch.stack([before, before]))
