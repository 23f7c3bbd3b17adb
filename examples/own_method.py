"""A method of your own in your own file: being defined registers it, and every law and report applies to it.

python examples/own_method.py [MODEL]
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

import farspan
from farspan.attention.checks import require
from farspan.attention.cost import Cost, Queries
from farspan.attention.keys import Keys
from farspan.attention.method import AttentionMethod
from farspan.attention.selection import Index, TokenIndex


@dataclass(frozen=True, kw_only=True)
class ByNorm(AttentionMethod):
    """Decode reads the ``k`` keys of the smallest norm, which often get the most attention (2406.11430),
    and the ``local`` newest keys. Prefill is dense."""

    name: ClassVar[str] = "by_norm"
    title: ClassVar[str] = "Keys of the smallest norm"
    paper: ClassVar[str] = "2406.11430"

    k: int = 256
    local: int = 32

    def __post_init__(self) -> None:
        require(self, k=(1, None), local=(1, None))

    def reads(self, queries: Queries) -> Cost:
        """What `farspan plan` counts with: k + local keys, and every raw key for its norm."""
        if self.k + self.local >= queries.length:
            return queries.cost()
        keys = queries.seen.clamp(max=self.k + self.local)
        return queries.cost(keys, selection=queries.raw_keys(queries.length))

    def select_decode(self, q: torch.Tensor, keys: Keys) -> Index:
        """q [B, H, Tq, D] -> the positions each KV head reads, [B, Hkv, Tq, M] ascending, of which the first
        ``counts`` are read."""
        if self.k + self.local >= keys.longest():
            return None  # everything is within the budget
        norms = keys.read_all_keys().norm(dim=-1)[:, :, None]  # [B, Hkv, 1, Tk]
        rows = torch.arange(keys.past, keys.length)[:, None]  # the queries' own positions, [Tq, 1]
        places = torch.arange(keys.length)
        first = 0 if keys.start is None else keys.start[:, None, None, None]  # where each padded row begins
        hidden = (places > rows - self.local) | (places < first)  # later, local, or padding
        smallest, best = norms.masked_fill(hidden, torch.inf).topk(self.k, largest=False)
        best = best.where(smallest < torch.inf, -1)  # a short row of a padded batch has fewer than k
        local = (rows - torch.arange(self.local)).expand(*best.shape[:3], -1)
        tokens = torch.cat([best, local], -1)
        counts = (tokens >= first).sum(-1).int()
        tokens = tokens.where(tokens >= first, keys.length - 1).sort().values
        return TokenIndex(tokens=tokens, counts=counts)


def main(name: str = "smollm2-135m") -> None:
    model, tokenizer = farspan.load(name)
    inputs = tokenizer("One day a bear and a fox met at the river. " * 60, return_tensors="pt")
    with farspan.patch(model, "by_norm:k=128") as patched:
        model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
        print(patched.report())


if __name__ == "__main__":
    main(*sys.argv[1:])
