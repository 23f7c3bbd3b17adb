"""SnapKV: after the prompt only the keys stay that its last queries attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..eviction import Eviction, stay
from ..keys import Keys
from ..method import AttentionMethod
from ..ops.select import top_k
from ..received import attention_received
from ..selection import Index, TokenIndex


@dataclass(frozen=True, kw_only=True)
class SnapKV(AttentionMethod):
    """Decode reads k keys of the prompt, chosen once at its end, and every key generated since (SnapKV,
    2404.14469).

    The prompt's last ``window`` keys stay. Of the keys before them stay the k - window that receive most
    attention from the last ``window`` queries: softmax over all keys, summed over the queries, then pooled
    over the ``kernel`` positions around each ("avg", counting 0 beyond the ends, or "max"). Prefill is dense,
    and a prompt of at most k keys stays whole. Defaults are those of the authors' code; their longest
    LongBench runs take k=4096, kernel=7, pool=max.

    Evicted keys stay in the store and are not read by decode again: this saves reads, not memory. A further
    prompt reads all of them (prefill is dense) and chooses anew. With ``evict`` the store drops them after
    the first step of decode, and a further prompt reads and chooses among the keys that are left. For a
    prompt in chunks the last queries of the whole prompt choose. After a crop the next step reads everything
    that is stored and chooses by its own query; a crop into the prompt is refused where ``evict`` has dropped
    keys of it.
    Departures: one choice per KV head, by the attention summed over its query heads, where the authors' code
    repeats keys to query heads and chooses for each.
    """

    name: ClassVar[str] = "snapkv"
    title: ClassVar[str] = "SnapKV"
    paper: ClassVar[str] = "2404.14469"

    k: int = 2048
    window: int = 32
    kernel: int = 5
    pool: str = "avg"
    evict: bool = False

    def __post_init__(self) -> None:
        require(self, k=(1, None), window=(1, None), kernel=(1, None), pool=("avg", "max"))
        if self.window >= self.k:
            raise SpecError(
                f"snapkv keeps the window and more of the prompt: k must be above window; got k={self.k}, "
                f"window={self.window}."
            )
        if self.kernel % 2 == 0:
            raise SpecError(f"snapkv takes an odd number of positions for kernel; got {self.kernel}.")

    @property
    def observation_window(self) -> int:
        return self.window

    def reads(self, queries: Queries) -> Cost:
        """Of the first token after the prompt; each further one reads one key more."""
        return queries.cost(queries.seen.clamp(max=self.k + 1))

    def on_prefill_end(self, q: Tensor, keys: Keys) -> None:
        earlier = keys.state.get("queries")  # of the chunks before this one
        if earlier is not None and q.shape[2] < self.window:
            q = torch.cat([earlier, q], 2)[:, :, -self.window :]
        self._choose(q, keys, keys.length)
        keys.state["queries"] = q.detach().clone()

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        state, device = keys.state, q.device
        state.pop("queries", None)  # the next prompt has its own
        full = None
        if "tokens" not in state:  # after a crop
            self._choose(q[:, :, :1], keys, keys.past + 1)
            full = torch.zeros(q.shape[0], keys.kv.num_kv_heads, keys.tq, dtype=torch.bool)  # on the host
            full[:, :, 0] = True
        tokens, end = state["tokens"], int(state["end"][0])
        if end - min(keys.starts or [0]) <= self.k:
            return None
        since = torch.arange(end, keys.length, device=device).expand(*tokens.shape[:2], -1)
        tokens = torch.cat([tokens, since], 2)[:, :, None].expand(-1, -1, keys.tq, -1)
        if keys.starts is None and keys.tq == 1:
            return TokenIndex(tokens=tokens, full=full)
        for b, first in enumerate(keys.starts or ()):
            if end - first <= self.k:  # a prompt that stays whole
                tokens = tokens.clone()
                tokens[b] = (first + torch.arange(tokens.shape[3], device=device)).clamp(max=keys.length - 1)
        since = torch.arange(keys.past + 1 - end, keys.length + 1 - end, device=device)  # of each query
        kept = since.new_full((1,), end) if keys.start is None else end - keys.start
        counts = (kept.clamp(max=self.k)[:, None] + since).clamp(min=0)  # [B or 1, Tq]
        counts = counts[:, None].expand(tokens.shape[:3])
        return TokenIndex.ragged(tokens, counts, full=full)

    def eviction(self, keys: Keys, phase: str) -> Eviction | None:
        tokens, end = keys.state["tokens"], keys.state["end"]
        since = keys.length - int(end[0])
        if not bool(end[0]) or keys.length <= self.k + since:
            return None
        if not tokens.shape[2]:  # prompts that stay whole
            tokens = tokens.new_zeros(*tokens.shape[:2], self.k)
        state = {"tokens": tokens[..., :0], "end": torch.zeros_like(end)}  # all that is left is read
        return Eviction(slots=stay(tokens, since, keys), crop=since, state=state)

    def _choose(self, q: Tensor, keys: Keys, length: int) -> None:
        """Choose the k positions of the first ``length`` that stay, by queries q [B, H, n, D] of the last
        n."""
        b, hkv = q.shape[0], keys.kv.num_kv_heads
        keys.state["end"] = torch.full((b,), length)
        before = length - self.window
        if length - min(keys.starts or [0]) <= self.k:
            keys.state["tokens"] = torch.zeros(b, hkv, 0, dtype=torch.long, device=q.device)
            return
        received = attention_received(q, keys, length).sum(2)[..., :before]
        pooled = avg_pool1d if self.pool == "avg" else max_pool1d
        received = pooled(received, self.kernel, stride=1, padding=self.kernel // 2)
        if keys.start is not None:
            padding = torch.arange(before, device=q.device) < keys.start[:, None, None]
            received = received.masked_fill(padding, -torch.inf)
        kept = top_k(received, self.k - self.window)
        window = torch.arange(before, length, device=q.device).expand(b, hkv, -1)
        keys.state["tokens"] = torch.cat([kept, window], 2)
