"""Write a method of your own in your own file. The definition of the class registers the method by its name.

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
    """A decode step reads the ``k`` keys of the smallest norm and the ``local`` newest keys. Keys of a small
    norm often get the most attention (arXiv 2406.11430). Prefill is dense."""

    name: ClassVar[str] = "by_norm"
    title: ClassVar[str] = "Keys of the smallest norm"
    paper: ClassVar[str] = "2406.11430"

    k: int = 256
    local: int = 32

    def __post_init__(self) -> None:
        require(self, k=(1, None), local=(1, None))

    def reads(self, queries: Queries) -> Cost:
        """The declared cost, which `farspan plan` uses: k + local keys are read, and all keys for their
        norm."""
        if self.k + self.local >= queries.length:
            return queries.cost()
        keys = queries.seen.clamp(max=self.k + self.local)
        return queries.cost(keys, selection=queries.raw_keys(queries.length))

    def select_decode(self, q: torch.Tensor, keys: Keys) -> Index:
        """For the queries q [B, H, Tq, D], the positions that each KV head reads: [B, Hkv, Tq, M], ascending.
        The first ``counts`` of them are read. None means that every key is read."""
        if self.k + self.local >= keys.longest():
            return None  # the budget covers every key
        norms = keys.read_all_keys().norm(dim=-1)[:, :, None]  # [B, Hkv, 1, Tk]
        rows = torch.arange(keys.past, keys.length)[:, None]  # the positions of the queries, [Tq, 1]
        places = torch.arange(keys.length)
        first = 0 if keys.start is None else keys.start[:, None, None, None]  # where each row begins
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
