"""Lists of tokens of different lengths in one rectangular tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def counted_first(
    candidates: Tensor, counted: Tensor, *, ascending: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Move the candidates that count to the front of their row; every other entry repeats one that counts.

    candidates: [..., K] int64 positions, all of them in range, whether they count or not.
    counted:    [..., K] bool, which of them count; or whole numbers [...], how many count: the first ones.
                Either is broadcast to ``candidates``.
    ascending:  sort the entries that count. Otherwise they keep their order.

    -> (tokens [..., M], counts [...] int32). On the CPU M is the largest count, and counts is None where all
    M entries of all rows count. On other devices M is K, so that nothing waits for the device. In a row in
    which nothing counts, every entry is its first candidate.

        candidates 7 2 9 4, counted  . x . x  ->  2 4 2 2 (elsewhere), 2 4 (on the CPU), count 2
    """
    k, on_cpu = candidates.shape[-1], candidates.device.type == "cpu"
    place = torch.arange(k, device=candidates.device)
    if counted.dtype == torch.bool:
        mask = counted.expand(candidates.shape)
        counts = mask.sum(-1)
    else:
        counts = counted.expand(candidates.shape[:-1])
        mask = place < counts[..., None]
    every = on_cpu and bool(mask.all())
    tokens = candidates
    if ascending:
        last = torch.iinfo(candidates.dtype).max
        tokens = (candidates if every else candidates.masked_fill(~mask, last)).sort(-1).values
    elif counted.dtype == torch.bool and not every:
        tokens = candidates.gather(-1, (~mask).byte().sort(dim=-1, stable=True).indices)
    if every:
        return tokens, None
    room = max(counts.max().item(), 0) if on_cpu and counts.numel() else k
    tokens, within = tokens[..., : int(room)], place[: int(room)] < counts[..., None]
    if on_cpu and bool(within.all()):
        return tokens, None
    spare = torch.where(counts[..., None] > 0, tokens[..., :1], candidates[..., :1])
    return torch.where(within, tokens, spare), counts.int()
