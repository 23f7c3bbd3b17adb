"""The attention that the keys of a sequence receive from its last queries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .keys import Keys
from .ops.scores import scores

_CPU, _DEVICE = 1 << 22, 1 << 26  # probabilities held at a time


@torch.no_grad()
def attention_of_last(q: Tensor, keys: Keys, length: int) -> Iterator[tuple[int, Tensor]]:
    """Causal attention of queries q [B, H, n, D], those of the last n of ``length`` positions, in tiles of
    queries of a bounded size, so that nothing of size n x length is made.

    -> (position of the tile's first query, probabilities [B, Hkv, G, rows, M] float32, or float64 for float64
    q, of the keys up to the tile's last query that are here); 0 in the padding. Raw keys are read, which is
    counted. Where peers hold keys, each rank has the probabilities of its own keys; the tiles of all ranks
    are of the same queries.
    """
    n, peers = q.shape[2], keys.peers
    k, places = keys.read_all_keys(), keys.places()
    most = _CPU if q.device.type == "cpu" else _DEVICE
    step = max(1, most // (q.shape[0] * q.shape[1] * length))  # the same for all peers
    for a in range(0, n, step):
        first, last = length - n + a, length - n + min(a + step, n) - 1
        upto = keys.held(last + 1)
        logits = scores(q[:, :, a : a + step], k[:, :, :upto], keys.softmax)
        rows = torch.arange(first, last + 1, device=q.device)[:, None]
        late = keys.held(first + 1)  # from here on some query of the tile does not see a key
        logits[..., late:].masked_fill_(places[late:upto] > rows, -torch.inf)
        if keys.start is not None:
            padding = places[:upto] < keys.start[:, None]  # [B, M]
            logits.masked_fill_(padding[:, None, None, None], -torch.inf)
        share = torch.softmax(logits, -1) if peers is None else peers.softmax(logits)
        if keys.start is not None:  # queries there see nothing
            share = share.masked_fill(rows < keys.start[:, None, None, None, None], 0)
        yield first, share


def attention_received(q: Tensor, keys: Keys, length: int) -> Tensor:
    """The attention that each key receives from each query head in ``attention_of_last``, summed over the
    queries: [B, Hkv, G, length]; of the keys of all ranks where peers hold some."""
    hkv, peers = keys.kv.num_kv_heads, keys.peers
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (q.shape[0], hkv, q.shape[1] // hkv, keys.held(length))
    received = torch.zeros(shape, dtype=wide, device=q.device)
    for _, tile in attention_of_last(q, keys, length):
        received[..., : tile.shape[-1]] += tile.sum(3)
    return received if peers is None else peers.gather(received, length)
