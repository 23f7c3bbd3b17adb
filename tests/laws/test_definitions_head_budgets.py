"""Methods that drop what they evict against definitions written apart, in float64: every output is attention
over the keys that are left, and a further prompt reads no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farspan
from farspan.attention.method import LayerInfo
from farspan.attention.softmax import Softmax

from . import naive
from .naive_evicting import H2ORow, SnapKVRow
from .test_definitions_evicting import made
from .tools import HKV, Data, H, Stream, layer_info

G = H // HKV
SETTINGS = [
    ("snapkv", {"k": 16, "window": 4}),
    ("snapkv", {"k": 9, "window": 8, "kernel": 3, "pool": "max"}),
    ("h2o", {"k": 16}),
    ("h2o", {"k": 3}),
]


class Left:
    """The keys that one KV head of a row has left, by their positions, and the definition of its method,
    which counts over these alone."""

    def __init__(self, row: SnapKVRow | H2ORow, data: Data, b: int, head: int) -> None:
        self.row, self.first, self.places = row, (data.starts or [0])[b], []  # type: ignore[var-annotated]
        heads = slice(head * G, head * G + G)
        self.q, self.k, self.v, self.scale = data.q[b, heads], data.k[b, head], data.v[b, head], data.scale

    def prompt(self, begin: int, end: int, last: bool) -> torch.Tensor:
        """Dense attention [G, n, D] of the positions begin .. end - 1; the last part of a prompt chooses."""
        old = len(self.places)
        self.places += range(max(begin, self.first), end)
        out = torch.zeros(G, end - begin, self.v.shape[1], dtype=torch.float64)
        for at, place in enumerate(self.places[old:], old):
            out[:, place - begin] = self._attend(place, set(range(at + 1)))
        queries, keys = self.q[:, self.places], self.k[self.places]
        if isinstance(self.row, H2ORow):
            self.row.prefilled(queries, keys, old)
        elif last:
            self.row.prefilled(queries, keys, len(self.places))
        return out

    def step(self, place: int) -> torch.Tensor:
        """[G, D]"""
        self.places.append(place)
        read = self.row.step(self.q[:, self.places], self.k[self.places])
        out = self._attend(place, read)
        kept = sorted(read)
        if isinstance(self.row, H2ORow):
            assert self.row.scores is not None
            self.row.scores = [self.row.scores[i] for i in kept]
            self.row.hitters = [kept.index(i) for i in self.row.hitters]
        else:
            assert self.row.kept is not None
            kept = sorted({*self.row.kept, *range(self.row.end, len(self.places))})
            self.row.kept, self.row.end = set(range(len(kept))), len(kept)
        self.places = [self.places[i] for i in kept]
        return out

    def _attend(self, place: int, read: set[int]) -> torch.Tensor:
        k, v = self.k[self.places], self.v[self.places]
        return torch.stack([naive.attention(q, k, v, read, self.scale) for q in self.q[:, place]])


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("turns", "starts"),
    [
        ([[60], [100], [130, 149]], None),
        ([[60], [100]], [0, 20, 47]),  # rows of 13 keys and more, so some are evicted later than others
        ([[18], [70]], [0, 3, 12]),
        ([[10], [40, 60]], None),
    ],
)
def test_step_by_step(name: str, settings: dict[str, Any], turns: list[list[int]], starts: Any) -> None:
    data, steps = Data.random(turns[-1][-1] + 12, starts, seed=3), 12
    method, row = made(name, {**settings, "evict": True}, data.scale)
    stream, firsts = Stream(method, data), starts or [0]
    rows = [[Left(row(), data, b, head) for head in range(HKV)] for b in range(len(firsts))]
    for turn in turns:
        for cut in turn:
            begin = stream.length
            got = stream.call(cut).out
            for b, heads in enumerate(rows):
                for head, left in enumerate(heads):
                    want = left.prompt(begin, cut, cut == turn[-1])
                    assert (got[b, head * G : head * G + G] - want).abs().max() < 1e-12
        for place in range(turn[-1], turn[-1] + steps):
            got = stream.call(place + 1).out
            for b, heads in enumerate(rows):
                for head, left in enumerate(heads):
                    assert (got[b, head * G : head * G + G, 0] - left.step(place)).abs().max() < 1e-12
            sizes = [len(heads[0].places) for heads in rows]
            assert stream.store.length == max(sizes)
            lost = [stream.length - first - n for first, n in zip(firsts, sizes, strict=True)]
            evicted = stream.store.evicted
            assert (evicted.counts if evicted else [0] * len(lost)) == lost
    assert stream.store.evicted_by


def test_a_crop_of_tokens_since_the_prompt() -> None:
    """The keys of the prompt that were chosen stay; the next step reads all that is left and chooses anew."""
    data = Data.random(80, None, seed=5)
    method, row = made("snapkv", {"k": 16, "window": 4, "evict": True}, data.scale)
    stream, left = Stream(method, data), Left(row(), data, 0, 1)
    stream.call(60)
    left.prompt(0, 60, True)
    for place in range(60, 66):
        stream.call(place + 1)
        left.step(place)
    stream.store.crop(4)
    left.places = left.places[:-4]
    left.row.cropped()
    for place in range(62, 70):
        got = stream.call(place + 1).out[0, G : 2 * G, 0]
        assert (got - left.step(place)).abs().max() < 1e-12
        assert stream.store.length == len(left.places)


# --- duo --------------------------------------------------------------------------------------------


def duo(alphas: list[float], **settings: Any) -> Any:
    tensors = {"layers.0.alpha": torch.tensor(alphas), "layers.1.alpha": torch.tensor([0.5, 0.6])}
    weights = {"alpha": tensors["layers.0.alpha"]}
    info = LayerInfo(**{**vars(layer_info(weights)), "tensors": tensors})
    return farspan.methods()["duo"](**settings).for_layer(info)


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("alphas", [[0.9, 0.1], [0.1, 0.9], [0.1, 0.2]])
@pytest.mark.parametrize(("starts", "sinks"), [(None, 3), ([0, 30, 101], 3), ([0, 9], 0)])
@pytest.mark.parametrize("cuts", [[150], [40, 41, 100, 117, 150]])
def test_duo(evict: bool, alphas: list[float], starts: Any, sinks: int, cuts: list[int]) -> None:
    """Streaming heads read the first keys and the last ones, the other heads all; only these stay stored."""
    data, recent = Data.random(170, starts, seed=7), 12
    share = 0.25 if max(alphas) > 0.5 else 0.5
    stream = Stream(duo(alphas, streaming=share, sinks=sinks, recent=recent, evict=evict), data)
    got = stream.run([*cuts, *range(151, 160), 166, 170]).out
    streaming = [head for head in range(HKV) if alphas[head] < 0.5]
    for b, first in enumerate(starts or [0]):
        for h in range(H):
            k, v = data.k[b, h // G], data.v[b, h // G]
            for i in range(first, 170, 1 if b else 7):
                read = set(range(first, i + 1))
                if h // G in streaming:
                    read = {j for j in read if j < first + sinks or j > i - recent}
                want = naive.attention(data.q[b, h, i], k, v, read, data.scale)
                assert (got[b, h, i] - want).abs().max() < 1e-12
    kv = stream.store.kv
    assert kv is not None
    held = sum(part.kv.length * len(part.heads) for part in getattr(kv, "parts", ()))
    most = 170 * (HKV - len(streaming)) + len(streaming) * (sinks + recent + 16 + 16 + 16)
    assert held <= most if evict else held == 0


def test_duo_streams_the_lowest_alphas_of_the_whole_model() -> None:
    heads = [duo([0.9, 0.1], streaming=share) for share in (0.25, 0.5, 0.75, 1.0)]
    assert [method.stream.tolist() for method in heads] == [[False, True]] * 3 + [[True, True]]
    assert duo([0.9, 0.8], streaming=0.5) is None and duo([0.9, 0.1], streaming=0.0) is None
    assert duo([0.5, 0.5], streaming=0.5).stream.tolist() == [True, True]  # of equals, the lower layer


def test_the_alphas_of_a_calibration() -> None:
    """The relative change of a head's output, over the queries that lose keys."""
    data = Data.random(90, seed=9)
    found = farspan.parse_method("duo:sinks=2,recent=10").calibration(layer_info())
    for part in (slice(0, 40), slice(40, 90)):
        found.observe(data.q[:, :, part], data.k[:, :, part], data.v[:, :, part], Softmax(data.scale))
    change, whole = torch.zeros(2, HKV, dtype=torch.float64)
    for begin, end in ((0, 40), (40, 90)):
        for h in range(H):
            k, v = data.k[0, h // G, begin:end], data.v[0, h // G, begin:end]
            for i in range(12, end - begin):
                q = data.q[0, h, begin + i]
                full = naive.attention(q, k, v, set(range(i + 1)), data.scale)
                read = {0, 1, *range(i - 9, i + 1)}
                change[h // G] += (naive.attention(q, k, v, read, data.scale) - full).square().sum()
                whole[h // G] += full.square().sum()
    torch.testing.assert_close(found.weights()["alpha"], (change / whole).sqrt().clamp(max=1).float())
    window = farspan.parse_method("duo").calibration(layer_info())
    window.observe(data.q, data.k, data.v, Softmax(data.scale, window=4))
    assert window.weights() == {}
