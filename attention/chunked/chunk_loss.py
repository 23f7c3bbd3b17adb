"""What ChunkLLM's adapters are trained towards: attention per chunk, and the ends of sentences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..boundaries import chunk_numbers, chunk_sums, within
from ..calibration.truth import attention_of_rows, kl_of_rows
from ..keys import Keys
from ..mass import sample_rows
from .adapters import Adapters

QUERIES = 128  # of a window, on which attention is compared


def chunk_loss(adapters: Adapters, q: Tensor, keys: Keys, longest: int) -> Tensor:
    """The loss of one window, a scalar: the KL divergence of the adapters' softmax over chunks from the
    teacher's attention mass of the chunks, meaned over rows, KV heads and sampled queries, plus the binary
    cross-entropy of the boundaries, meaned over tokens.

    q [B, H, T, D] are all queries of the window. Chunks end where sentences do (``keys.inputs.sentence_ends``
    [B, T]), cut to ``longest`` tokens. A query sees the tokens up to itself, so its own chunk is the part so
    far. The mass of a chunk is the mean over the group. Nothing of size T x T is made.
    """
    ends = keys.inputs.sentence_ends
    boundary = adapters.boundary_logits(keys.inputs.early_hidden_states)
    loss = binary_cross_entropy_with_logits(boundary, ends.to(boundary.dtype))
    numbers = chunk_numbers(within(ends, longest))[:, None, None]  # [B, 1, 1, T]
    count, place = int(numbers.max()) + 1, torch.arange(keys.length, device=q.device)
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    k = adapters.keys(keys.kv.k.to(wide.dtype))
    apart, sampled = loss.new_zeros(()), 0
    for rows, attention in attention_of_rows(wide, keys, sample_rows(keys.tq, QUERIES)):
        visible = place <= rows[:, None]  # [n, T]
        logits = adapters.queries(wide[:, :, rows]) @ k.transpose(2, 3) * keys.softmax.scale
        logits = logits.masked_fill(~visible, 0)  # [B, Hkv, n, T]
        seen = chunk_sums(visible.to(logits.dtype).expand(len(ends), 1, -1, -1), numbers, count)
        mean = chunk_sums(logits, numbers, count) / seen.clamp(min=1)
        gate = torch.log_softmax(mean.masked_fill(seen == 0, -torch.inf), -1)
        truth = chunk_sums(attention.mean(2), numbers, count)
        apart = apart + kl_of_rows(gate, truth) * len(rows)
        sampled += len(rows)
    return loss + apart / sampled
