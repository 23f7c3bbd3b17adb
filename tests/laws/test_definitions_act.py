"""ACT against its definition, written apart (naive_act.py): the sinks it finds, and what comes out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan import SpecError
from farspan.attention.attend import attend
from farspan.attention.block_maxima import BlockMaxima
from farspan.attention.calibrated.act import ACT
from farspan.attention.calibrated.columns import column_bound
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import PREFILL, LayerInfo
from farspan.attention.ops.block_max import block_max
from farspan.attention.ops.flash import flash
from farspan.attention.selection import BlockIndex, Rescaled
from farspan.attention.selection.rescaled import attend_rescaled
from farspan.attention.softmax import Softmax
from farspan.attention.sparse.sale import SALE

from . import naive_act
from .test_definitions import SCALE, G
from .tools import HKV, D, Data, H, Selection, layer_info

N = 150
SALE_FIELDS: dict[str, Any] = {
    "threshold": 0.5,
    "block_q": 8,
    "block_k": 4,
    "local": 8,
    "dense_below": 0,
    "q_bits": None,
}


def planted(seed: int = 0) -> Data:
    """Queries of most heads lean towards one direction of their KV head, and keys 0, 17, 60 and 110 point
    there, the last of them least."""
    data = Data.random(N, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    towards = torch.nn.functional.normalize(torch.randn(HKV, D, generator=generator).double(), dim=1)
    lean = torch.tensor([4.0, 4.0, 0.0, 3.0]).repeat(HKV)[:H].double()
    data.q = 0.4 * data.q + lean[:, None, None] * towards.repeat_interleave(G, 0)[:, None]
    for place, much in ((0, 6.0), (17, 6.0), (60, 6.0), (110, 3.0)):
        data.k[0, :, place] = much * towards
    return data


def peaked(seed: int = 0) -> Data:
    """Every query sees little but the few keys nearest to it."""
    data = Data.random(N, seed=seed)
    return Data(3 * data.q, 2 * data.k, data.v)


def call(method: ACT, data: Data, past: int, softcap: float | None = None, impl: str = "auto") -> Any:
    """(partial, sinks [H, N], index) of one call of the queries from ``past`` on."""
    keys = Keys(kv=KV(data.k, data.v), tq=N - past, softmax=Softmax(SCALE, softcap))
    q = data.q[:, :, past:]
    keys.prepared = method.prepare_prefill(q, keys)
    index = method.select_prefill(q, keys)
    part, _ = attend(method, PREFILL, q, dataclasses.replace(keys, prepared={}), impl=impl)
    return part, index.keys[0], index


def expect(
    data: Data,
    past: int,
    softcap: float | None,
    threshold: float,
    beta: float,
    read: Tensor,
    chosen: list[int],
) -> tuple[Tensor, list[set[int]]]:
    """(output [H, n, D], the sinks of each head) by the definition; read [1 | Hkv | H, n, N]."""
    read = read.repeat_interleave(H // len(read), 0)
    out, found = [], []
    for h in range(H):
        matrix = naive_act.probabilities(data.q[0, h, past:], data.k[0, h // G], SCALE, softcap, read[h])
        found.append(naive_act.sinks(matrix, threshold) if h in chosen else set())
        out.append(naive_act.calibrated(matrix, found[-1], beta) @ data.v[0, h // G])
    return torch.stack(out), found


def as_sets(sinks: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in sinks]


def causal(past: int) -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()[None, past:]


@pytest.mark.parametrize(
    "make", [planted, peaked, lambda: Data.random(N)], ids=["planted", "peaked", "random"]
)
@pytest.mark.parametrize("past", [0, 37, 133])
@pytest.mark.parametrize(("softcap", "beta"), [(None, 0.4), (3.0, 0.0), (None, 1.0)])
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_dense(make: Any, past: int, softcap: float | None, beta: float, impl: str) -> None:
    data, threshold = make(), 0.05
    chosen = [0, 1, 2, 5, 7]
    method = dataclasses.replace(
        ACT(heads="all", beta=beta, threshold=threshold),
        chosen=torch.isin(torch.arange(H), torch.tensor(chosen)),
    )
    part, sinks, _ = call(method, data, past, softcap, impl)
    want, found = expect(data, past, softcap, threshold, beta, causal(past), chosen)
    assert as_sets(sinks) == found
    assert any(found) or past > 0 or make is not planted, "the case has no sink"
    assert (part.out[0] - want).abs().max() < 1e-12
    plain = flash(data.q[:, :, past:], KV(data.k, data.v), Softmax(SCALE, softcap))
    assert (part.lse - plain.lse).abs().max() < 1e-12, "the row sum is that of the attention calibrated"
    if beta < 1 and any(found):
        assert (part.out - plain.out)[0, [h for h in range(H) if found[h]]].abs().max() > 0.05


def test_planted_sinks_are_found_and_token_0_is_none() -> None:
    method = ACT(heads="all", threshold=0.1)
    _, sinks, _ = call(method, planted(), 0)
    for h in (0, 1, 4, 5):
        early = {t for t in as_sets(sinks)[h] if t < N - 30}
        assert early == {17, 60}, f"head {h}"
    assert not bool(sinks[:, 0].any())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(SALE):
    """SALE with the true maxima, of the attention that it reads."""

    def block_maxima(self, q: Tensor, keys: Keys) -> BlockMaxima:
        index = self.select_prefill(q, keys)
        read = torch.ones(1, 1, keys.tq, keys.length, dtype=torch.bool)
        if index is not None:
            read = index.to_mask(keys.tq, keys.length)
        block_q, block_k = 16, 8  # need not be those that it selects by
        nq, nk = -(-keys.tq // block_q), -(-keys.length // block_k)
        largest = torch.zeros(1, H, nq, nk, dtype=torch.float64)
        for h in range(H):
            mask = read[0, h * read.shape[1] // H] & causal(keys.past)[0]
            matrix = naive_act.probabilities(q[0, h], keys.kv.k[0, h // G], SCALE, keys.softmax.softcap, mask)
            for n in range(nq):
                for j in range(nk):
                    block = matrix[n * block_q : (n + 1) * block_q, j * block_k : (j + 1) * block_k]
                    largest[0, h, n, j] = block.max()
        return BlockMaxima(largest.log(), block_q, block_k)


def over(cls: type[SALE], **fields: Any) -> SALE:
    method = cls(**(SALE_FIELDS | fields)).for_layer(layer_info())
    assert isinstance(method, SALE)
    return method


@pytest.mark.parametrize("make", [planted, peaked], ids=["planted", "peaked"])
@pytest.mark.parametrize("past", [0, 40])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(
    "fields", [{}, {"block_q": 16, "block_k": 32, "local": 16, "threshold": 9.0}], ids=str
)
@pytest.mark.parametrize("cls", [Exact, SALE])
def test_over_another_method(
    make: Any, past: int, softcap: float | None, fields: dict[str, Any], cls: type[SALE]
) -> None:
    """With true maxima no sink is missed. SALE's estimates, of keys in four bits, are no bound: here, with
    queries not rounded, they are off by too little to lose one."""
    data, threshold, beta = make(), 0.07, 0.4
    inner = over(cls, **fields)
    method = ACT(heads="all", threshold=threshold, beta=beta, over=inner)
    part, sinks, index = call(method, data, past, softcap)
    assert index.read is not None
    read = Selection(PREFILL, index, N - past, N, None, 1).mask()[0]
    assert int((causal(past) & ~read).sum()) > 0, "everything is read"
    want, found = expect(data, past, softcap, threshold, beta, read, list(range(H)))
    assert as_sets(sinks) == found
    assert any(found) or make is not planted
    assert (part.out[0] - want).abs().max() < 1e-12


@pytest.mark.parametrize("past", [0, 40, 133])
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (8, 24), (64, 5)])
def test_the_bound_is_the_mean_of_the_maxima_over_queries(past: int, block_q: int, block_k: int) -> None:
    for data in (planted(), peaked(), Data.random(N)):
        q = data.q[:, :, past:]
        keys = Keys(kv=KV(data.k, data.v), tq=N - past, softmax=Softmax(SCALE))
        lse = flash(q, KV(data.k, data.v), Softmax(SCALE)).lse
        largest = block_max(q, data.k, lse, Softmax(SCALE), block_q=block_q, block_k=block_k)
        maxima = BlockMaxima(largest.log(), block_q, block_k)
        bound = column_bound(maxima, torch.arange(H), keys)[0]
        for h in range(H):
            matrix = naive_act.probabilities(q[0, h], data.k[0, h // G], SCALE, None, causal(past)[0])
            means = torch.tensor(naive_act.column_means(matrix), dtype=torch.float64)
            assert bool((bound[h] >= means - 1e-12).all())
            most = largest[0, h].tolist()
            for t in range(N):
                rows = [i for i in range(N - past) if past + i >= t]
                want = sum(most[i // block_q][t // block_k] for i in rows) / len(rows)
                assert bound[h, t] == pytest.approx(want, rel=1e-12)


def test_a_row_of_sinks_alone_keeps_them() -> None:
    """An index may leave a query nothing but sinks; it reads them as ever."""
    data = Data.random(32)
    blocks = torch.tensor([[0, 0], [1, 0], [0, 2], [1, 3]]).expand(1, H, 4, 2).int()
    counts = torch.tensor([1, 1, 2, 2]).expand(1, H, 4).int()
    read = BlockIndex(blocks=blocks, counts=counts, block_q=8, block_k=8)
    sinks = torch.zeros(1, H, 32, dtype=torch.bool)
    sinks[:, ::2, 8:16] = True
    keys = Keys(kv=KV(data.k, data.v), tq=32, softmax=Softmax(SCALE))
    got = attend_rescaled(data.q, keys, Rescaled(read=read, keys=sinks, factor=0.3), "auto")
    mask = read.to_mask(32, 32)[0]
    for h in range(H):
        matrix = naive_act.probabilities(data.q[0, h], data.k[0, h // G], SCALE, None, mask[h])
        want = naive_act.calibrated(matrix, as_sets(sinks[0])[h], 0.3) @ data.v[0, h // G]
        assert (got.out[0, h] - want).abs().max() < 1e-12


def test_a_row_that_sinks_hold_almost_all_of_loses_nothing() -> None:
    """Where the rest holds e-20 of a row, float32 still gives it its part: it is attended to by itself."""
    data = Data.random(64, dtype=torch.float32)
    data.q[:] = 0
    data.q[..., 0] = 8.0
    data.k[..., 0] = 0
    data.k[:, :, 9, 0] = 24.0
    keys = Keys(kv=KV(data.k, data.v), tq=64, softmax=Softmax(SCALE))
    sinks = torch.zeros(1, H, 64, dtype=torch.bool)
    sinks[..., 9] = True
    got = attend_rescaled(data.q, keys, Rescaled(read=None, keys=sinks, factor=0.5), "auto")
    wide = data.to(torch.float64)
    for h in range(H):
        matrix = naive_act.probabilities(wide.q[0, h], wide.k[0, h // G], SCALE, None, causal_of(64))
        assert matrix[20, 9] > 1 - 1e-6
        want = naive_act.calibrated(matrix, {9}, 0.5) @ wide.v[0, h // G]
        assert (got.out[0, h] - want).abs().max() < 1e-5


def test_rows_of_a_batch_have_sinks_of_their_own() -> None:
    one, two = planted(), planted(seed=1)
    both = Data(*(torch.cat([getattr(one, x), getattr(two, x)]) for x in ("q", "k", "v")))
    both.k[1, :, 90] = both.k[1, :, 17]
    method = ACT(heads="all")
    keys = Keys(kv=KV(both.k, both.v), tq=N, softmax=Softmax(SCALE))
    part, _ = attend(method, PREFILL, both.q, keys)
    sinks = keys.prepared["act_sinks"]
    assert bool((sinks[0] != sinks[1]).any())
    for b in range(2):
        row = Data(both.q[b : b + 1], both.k[b : b + 1], both.v[b : b + 1])
        alone, mine, _ = call(method, row, 0)
        assert torch.equal(sinks[b], mine)
        assert (part.out[b] - alone.out[0]).abs().max() < 1e-12


def causal_of(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def test_gradients_are_those_of_the_definition() -> None:
    data = planted()
    keys_at = torch.zeros(1, H, N, dtype=torch.bool)
    keys_at[:, :5, [17, 60]] = True
    for read in (
        None,
        over(SALE).select_prefill(data.q, Keys(kv=KV(data.k, data.v), tq=N, softmax=Softmax(SCALE))),
    ):
        grads = []
        mask = causal(0) if read is None else read.to_mask(N, N)[0]
        weight = torch.randn(H, N, D, generator=torch.Generator().manual_seed(2)).double()
        for fast in (True, False):
            q, k, v = (x.clone().requires_grad_() for x in (data.q, data.k, data.v))
            if fast:
                keys = Keys(kv=KV(k, v), tq=N, softmax=Softmax(SCALE))
                out = attend_rescaled(q, keys, Rescaled(read=read, keys=keys_at, factor=0.4), "auto").out[0]
            else:
                rows = mask.repeat_interleave(H // len(mask), 0)
                logits = torch.einsum("hid,hjd->hij", q[0], k[0].repeat_interleave(G, 0)) * SCALE
                shares = torch.softmax(logits.masked_fill(~rows, -torch.inf), -1)
                held = (shares * keys_at[0, :, None]).sum(-1, keepdim=True)
                grown = shares * (1 - 0.4 * held) / (1 - held)
                out = torch.where(keys_at[0, :, None], 0.4 * shares, grown) @ v[0].repeat_interleave(G, 0)
            grads.append(torch.autograd.grad((out * weight).sum(), (q, k, v)))
        for a, b in zip(*grads, strict=True):
            assert (a - b).abs().max() < 1e-9


def test_specs() -> None:
    method = farspan.parse_method("act:over=(sale:threshold=2,local=128),beta=0.5")
    assert method == ACT(over=SALE(threshold=2.0, local=128), beta=0.5)
    assert farspan.parse_method(str(method)) == method
    assert farspan.parse_method("act:over=sale:threshold=2").over == SALE(threshold=2.0)
    assert farspan.parse_method("act:over=none").over is None
    with pytest.raises(SpecError, match=r"estimates block maxima, such as sale; got over=quest"):
        farspan.parse_method("act:over=(quest:page=8)")
    with pytest.raises(SpecError, match="sale has no parameter 'thresh'"):
        farspan.parse_method("act:over=(sale:thresh=1)")


def test_layers_and_heads_that_are_not_chosen_are_those_of_the_method_underneath() -> None:
    weights = {"heads": torch.tensor([False, True, False, True])}
    layer = LayerInfo(3, num_heads=2, num_kv_heads=1, head_dim=16, weights=weights, tp_size=2, tp_rank=1)
    served = ACT().for_layer(layer)
    assert isinstance(served, ACT) and served.chosen is not None and served.chosen.tolist() == [False, True]
    none = dataclasses.replace(layer, weights={"heads": torch.zeros(4, dtype=torch.bool)})
    assert ACT().for_layer(none) is None
    inner = SALE(threshold=1.0)
    for info in (none, dataclasses.replace(layer, index=1), dataclasses.replace(layer, index=31)):
        assert isinstance(ACT(over=inner).for_layer(info), SALE)
    with pytest.raises(farspan.FarspanError, match="made for another model"):
        ACT().for_layer(LayerInfo(3, 6, 2, 16, weights=weights))
    with pytest.raises(farspan.FarspanError, match="calibrate --method act"):
        ACT().for_layer(LayerInfo(3, 6, 2, 16))
