"""Law 7 for summaries of values, queries and hidden states: kept over calls = made from the whole text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from farspan.attention.dense import Dense
from farspan.attention.errors import FarspanError
from farspan.attention.kv import KV
from farspan.attention.method import AttentionMethod
from farspan.attention.needs import Inputs, Needs
from farspan.attention.softmax import Softmax
from farspan.attention.sources import Source, Sources
from farspan.attention.summary import BlockPool, Summary, identity
from farspan.runtime.layer_call import LayerCall, LocalKeys
from farspan.runtime.padding import Padding
from farspan.runtime.store.store import KVStore

BATCH, HEADS, KV_HEADS, D, VALUE_DIM, HIDDEN = 3, 4, 2, 8, 6, 10


@dataclass(frozen=True)
class Weighed:
    """Three numbers for each token, of its hidden state and its values."""

    layer: torch.nn.Module
    block: ClassVar[None] = None
    dtype: ClassVar[None] = None
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"hidden_states", "values"})

    @property
    def key(self) -> tuple:
        return ("weighed", identity(self.layer))

    def width(self, head_dim: int) -> int:
        return 3

    def compute(self, x: Sources) -> Tensor:
        with torch.no_grad():
            return (self.layer(x.hidden_states) + x.values.sum((1, 3))[..., None])[:, None]


@dataclass(frozen=True)
class Last:
    """The last query of a block beside the block's values weighed by it, as a core token has them."""

    block: int
    dtype: ClassVar[None] = None
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"queries", "keys", "values"})

    @property
    def key(self) -> tuple:
        return ("last", self.block)

    def width(self, head_dim: int) -> int:
        return 2 * head_dim

    def compute(self, x: Sources) -> Tensor:
        group = x.queries.shape[1] // x.keys.shape[1]
        k, v = (t.repeat_interleave(group, 1).split(self.block, 2) for t in (x.keys, x.values))
        out = []
        for q, keys, values in zip(x.queries.split(self.block, 2), k, v, strict=True):
            weights = (q[:, :, -1:] @ keys.mT).softmax(-1)
            out.append(torch.cat([q[:, :, -1:], weights @ values], -1))
        return torch.cat(out, 2)


torch.manual_seed(0)
SUMMARIES: dict[str, Summary] = {
    **{f"mean of {name}": BlockPool(8, of=name) for name in ("values", "queries", "hidden_states")},
    "before rope": BlockPool(8, ("max", "min"), of="keys_before_rope"),
    "label": Weighed(torch.nn.Linear(HIDDEN, 3).double()),
    "core": Last(8),
    "wide core": Last(40),
}


@dataclass(frozen=True, kw_only=True)
class Keeps(Dense):
    """Dense attention with a summary beside it."""

    summary: Summary = SUMMARIES["core"]

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (self.summary,)


def begin(source: LocalKeys, method: AttentionMethod) -> None:
    """As a layer call begins it."""
    source.begin(LayerCall(Dense(), method))


class Text:
    """A text of a batch whose rows begin at ``starts``, fed in calls to one layer with a store."""

    def __init__(self, summary: Summary, starts: list[int] | None = None) -> None:
        made = torch.Generator().manual_seed(1)
        sizes = {"q": (HEADS, D), "k": (KV_HEADS, D), "v": (KV_HEADS, VALUE_DIM), "hidden": (1, HIDDEN)}
        self.x = {
            name: torch.randn(BATCH, h, 400, d, generator=made, dtype=torch.float64)
            for name, (h, d) in sizes.items()
        }
        self.summary, self.starts, self.store = summary, starts, KVStore()

    def _source(self, past: int, end: int, store: KVStore | None) -> LocalKeys:
        q, k, v, hidden = (x[:, :, past:end] for x in self.x.values())
        if store is not None:
            store.append(k, v)
        needs = Needs(keys_before_rope=True, hidden_states=True)
        fed = Inputs(needs=needs, q=q, k=k, hidden=hidden[:, 0], length=end)
        starts = None if self.starts is None else [min(first, end) for first in self.starts]
        padding = None if starts is None else Padding(torch.tensor(starts), starts)
        kv = KV(k, v) if store is None else store.kv
        assert kv is not None
        return LocalKeys(q, kv, Softmax(1.0), padding=padding, store=store, fed=fed)

    def call(self, count: int) -> None:
        """The next ``count`` tokens; what is kept then equals what is made from all tokens so far."""
        end = self.store.length + count
        method: AttentionMethod = Keeps(summary=self.summary)
        source = self._source(self.store.length, end, self.store)
        begin(source, method)
        got = source.keys(slice(0, BATCH), {}, count).summary(self.summary)
        whole = self._source(0, end, None).supply.sources(self.summary.reads, 0)
        for b in range(BATCH):
            first = min(self.starts[b], end) if self.starts else 0
            if first == end:
                continue
            want = self.summary.compute(whole.cut(first, rows=[b]))[0]
            skip = first if self.summary.block is None else 0
            assert torch.equal(got[b, :, skip : skip + want.shape[1]], want), (b, end)
            row = source.keys(slice(0, BATCH), {}, count).row(b)
            assert torch.equal(row.summary(self.summary)[0], want)

    def change(self, rows: list[int]) -> None:
        self.store.reorder(torch.tensor(rows))
        self.x = {name: x[rows] for name, x in self.x.items()}
        self.starts = None if self.starts is None else [self.starts[r] for r in rows]

    def crop(self, count: int) -> None:
        """Drop tokens; the text goes on with others."""
        self.store.crop(count)
        for x in self.x.values():
            x[:, :, self.store.length :] = x[:, :, self.store.length :].flip(2)


@pytest.mark.parametrize("name", SUMMARIES)
@pytest.mark.parametrize("starts", [None, [0, 5, 39], [45, 13, 20]])
def test_kept_equals_made_anew(name: str, starts: list[int] | None) -> None:
    text = Text(SUMMARIES[name], starts)
    for count in (41, 1, 1, 6, 17, 1, 3, 60):
        text.call(count)
    for back in (1, 16, 9, 3):
        text.crop(back)
        text.call(2)
        text.call(7)
    text.change([2, 0, 1])
    text.call(5)
    twin = copy.copy(text)
    twin.store = copy.deepcopy(text.store)
    twin.x = {name: x.clone() for name, x in text.x.items()}
    for x in twin.x.values():
        x[:, :, text.store.length :] += 1
    text.call(4)
    twin.call(30)
    text.call(30)
    text.store.reset()
    text.call(50)


@pytest.mark.parametrize("name", SUMMARIES)
def test_rows_that_end_before_the_call(name: str) -> None:
    """Padding behind a row goes into no entry of the row."""
    summary = SUMMARIES[name]
    text = Text(summary, [0, 5, 39])
    text.call(60)
    source = text._source(60, 130, text.store)
    source.ends = ends = [130, 101, 88]
    begin(source, Keeps(summary=summary))
    keys, whole = source.keys(slice(0, BATCH), {}, 70), text._source(0, 130, None).supply
    for b, (first, end) in enumerate(zip([0, 5, 39], ends, strict=True)):
        want = summary.compute(whole.sources(summary.reads, 0).cut(first, end, [b]))
        assert torch.equal(keys.row(b).summary(summary), want)


def test_what_is_kept_is_little_and_what_is_not_there_is_said() -> None:
    text = Text(SUMMARIES["core"])
    text.call(200)
    kept = text.store.summaries.recent
    assert {name: x.shape[2] for name, x in kept.tensors.items()} == {"queries": 40}
    text.crop(40)  # to the end of a block: nothing before it is needed again
    text.call(3)
    text.crop(3)
    text.crop(96)
    text.call(3)
    with pytest.raises(FarspanError, match=r"from 67 to 37 .* the queries of the tokens from position 32 on"):
        text.crop(30)
    assert text.store.total == 67
    text.call(1)
    text.store.reset()
    text.call(20)
    label = Text(SUMMARIES["label"])
    label.call(90)
    assert not label.store.summaries.recent.tensors
    label.crop(57)  # a label is its own token's
    label.call(5)


def test_a_summary_says_what_it_reads() -> None:
    text = Text(SUMMARIES["label"])
    x = text._source(0, 20, None).supply.sources({"keys"}, 0)
    with pytest.raises(FarspanError, match="computes from hidden_states and does not declare it"):
        SUMMARIES["label"].compute(x)
    one, two = torch.nn.Linear(HIDDEN, 3), torch.nn.Linear(HIDDEN, 3)
    assert Weighed(one).key == Weighed(one).key != Weighed(two).key
