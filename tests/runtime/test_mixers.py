"""Mixers in place of attention: an exponential moving average of values, against a recurrent loop in
float64."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from small_models import Feed, decode, logits, make, padded, prompt, snapshot
from torch import Tensor, nn

import farspan
from farspan import FarspanError, SpecError, Unsupported
from farspan.attention.hybrid import Geometry, parse_mixer
from farspan.attention.hybrid.mixer import Mixer, Rotary, State

CHUNK = 16
EXPERTS = ("gpt_oss", "qwen3_next")  # torch multiplies by groups in float32 at most


class Ema(Mixer):
    """s_t = a s_{t-1} + (1 - a) V x_t, out_t = O (s_t * sigmoid(G x_t)), by chunks of 16 tokens."""

    name: ClassVar[str] = "ema"

    def __init__(self, hidden_size: int, width: int = 24, seed: int = 0) -> None:
        super().__init__()
        self.hidden_size, self.width = hidden_size, width
        self.v_proj, self.g_proj = (nn.Linear(hidden_size, width, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.decay = nn.Parameter(torch.empty(width))
        made = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=made)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.width,),)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.decay.dtype, torch.float32)

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        (s,) = state or self.initial_state(hidden.shape[0], hidden.device)
        a = self.decay.sigmoid().to(s)
        real = hidden.new_ones(hidden.shape[:2]) if mask is None else mask
        real = real.to(s)[..., None]  # a padding token neither decays nor adds
        x = (1 - a) * self.v_proj(hidden).to(s) * real
        log_a = a.log() * real
        outs = []
        for x_c, log_c in zip(x.split(CHUNK, 1), log_a.split(CHUNK, 1), strict=True):
            total = log_c.cumsum(1)  # [B, C, width]
            gap = total[:, :, None] - total[:, None]  # decay from token j to token i
            keep = torch.ones(gap.shape[1:3], dtype=torch.bool, device=gap.device).tril()
            inside = (gap.masked_fill(~keep[..., None], -torch.inf).exp() * x_c[:, None]).sum(2)
            outs.append(inside + total.exp() * s[:, None])
            s = outs[-1][:, -1]
        out = torch.cat(outs, 1).to(hidden.dtype) * self.g_proj(hidden).sigmoid()
        return self.o_proj(out), (s,)

    def step(self, hidden: Tensor, state: State, rotary: Rotary | None = None) -> tuple[Tensor, State]:
        a = self.decay.sigmoid().to(state[0])
        s = a * state[0] + (1 - a) * self.v_proj(hidden).to(state[0])
        return self.o_proj(s.to(hidden.dtype) * self.g_proj(hidden).sigmoid()), (s,)


def loop(mixer: Ema, hidden: Tensor) -> Tensor:
    """The definition: hidden [T, hidden] -> [T, hidden], token by token in float64."""
    w = {name: p.detach().double() for name, p in mixer.named_parameters()}
    a, s, outs = w["decay"].sigmoid(), torch.zeros(mixer.width).double(), []
    for x in hidden.double():
        s = a * s + (1 - a) * (w["v_proj.weight"] @ x)
        outs.append(w["o_proj.weight"] @ (s * (w["g_proj.weight"] @ x).sigmoid()))
    return torch.stack(outs)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture
def mixer() -> Ema:
    return Ema(64).double()


def test_chunks_steps_and_splits_are_the_loop(mixer: Ema) -> None:
    x = random(2, 50, 64)
    want = torch.stack([loop(mixer, row) for row in x])
    whole, end = mixer(x)
    assert torch.allclose(whole, want, atol=1e-12)
    first, state = mixer(x[:, :21])
    second, state = mixer(x[:, 21:], state)
    assert torch.allclose(torch.cat([first, second], 1), want, atol=1e-12)
    assert torch.allclose(state[0], end[0], atol=1e-12)
    state, outs = mixer.initial_state(2, x.device), []
    for t in range(50):
        out, state = mixer.step(x[:, t], state)
        outs.append(out)
        default, other = Mixer.step(mixer, x[:, t], state)
        assert default.shape == out.shape and other[0].shape == state[0].shape
    assert torch.allclose(torch.stack(outs, 1), want, atol=1e-12)
    assert torch.allclose(state[0], end[0], atol=1e-12)


def test_padding_changes_nothing(mixer: Ema) -> None:
    x = random(3, 40, 64)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, :23] = mask[2, 31:] = False
    out, (state,) = mixer(x, None, mask)
    for row, (a, b) in enumerate([(0, 40), (23, 40), (0, 31)]):
        alone, (s,) = mixer(x[row : row + 1, a:b])
        assert torch.allclose(out[row, a:b], alone[0], atol=1e-12) and torch.allclose(state[row], s[0])


class Replaced:
    """A model of the tests whose layers 1 and 2 run the loop, row by row and always from the first token."""

    def __init__(self, model: Any, mixers: dict[int, Ema]) -> None:
        self.model = copy.deepcopy(model)
        for index, one in mixers.items():
            self.model.model.layers[index].self_attn = _Loop(one)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [T, V] of one row without padding."""
        with torch.no_grad():
            return self.model(ids[None], use_cache=False).logits[0]


class _Loop(nn.Module):
    def __init__(self, mixer: Ema) -> None:
        super().__init__()
        self.mixer = [mixer]

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return loop(self.mixer[0], hidden_states[0])[None].to(hidden_states), None


@pytest.fixture(params=["llama", "olmo2", "gemma3", "gpt_oss", "qwen3_next"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> Any:
    made = make(name)
    return made if name in EXPERTS else made.double()


@pytest.fixture
def mixers(name: str) -> dict[int, Ema]:
    layers = {"qwen3_next": (1,), "olmo2": (0, 1, 2)}.get(name, (0, 1))  # of olmo2 every layer
    made = {i: Ema(64, seed=i) for i in layers}
    return made if name in EXPERTS else {i: one.double() for i, one in made.items()}


def batch(lengths: tuple[int, ...], new: int) -> tuple[Tensor, Tensor]:
    """A left-padded batch whose last ``new`` tokens are to be decoded."""
    inputs = padded(tuple(n + new for n in lengths))
    return inputs["input_ids"], inputs["attention_mask"]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal within rounding: in float32 three times what the unpatched Qwen3-Next, row alone against padded
    batch, differs by (2e-5)."""
    return bool((a - b).abs().max() <= (1e-6 if a.dtype == torch.float64 else 6e-5) * b.abs().max())


@pytest.mark.parametrize("how", [{}, {"prefill_chunk": 20}], ids=["whole", "chunked"])
def test_prefill_decode_and_padding(
    name: str, model: Any, mixers: dict[int, Ema], how: dict[str, Any]
) -> None:
    """Rows of a padded batch, prefilled and decoded, are the rows alone under the loop."""
    ids, mask = batch((41, 29, 40), 6)
    twin = Replaced(model, mixers)
    with farspan.patch(model, mixers=mixers, **how) as patched:
        feed = Feed(model, ids, mask)
        got = torch.cat([feed(41), *(feed(1) for _ in range(4)), feed(2)], 1)
        report = patched.report()
    for row in range(3):
        want = twin(ids[row, mask[row].bool()])
        assert close(got[row, -len(want) :], want), row
    assert [x.layer for x in report.mixers] == list(mixers)
    assert all(x.state_bytes == 24 * model.dtype.itemsize and x.mixer == "ema" for x in report.mixers)
    assert all(x.tokens == 3 * 47 for x in report.mixers)
    assert not set(mixers) & {layer.layer for layer in report.layers}
    assert "mixer ema in layers" in str(report) and report.to_dict()["mixers"][0]["mixer"] == "ema"


def test_generate(model: Any, mixers: dict[int, Ema]) -> None:
    """Greedy tokens are those of recomputing everything; sampling, beams and rows that come alone agree."""
    twin = Replaced(model, mixers)
    inputs = padded((25, 18))
    with farspan.patch(model, mixers=mixers):
        tokens = decode(model, inputs, new=8)
        for row in range(2):
            ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()]
            for token in tokens[row]:
                assert int(twin(ids)[-1].argmax()) == int(token)
                ids = torch.cat([ids, token[None]])
        beams = decode(model, inputs, new=8, num_beams=3)
        uncached = decode(model, inputs, new=8, num_beams=3, use_cache=False)
        assert torch.equal(beams, uncached)
        drawn = []
        for cached in (True, False):
            torch.manual_seed(3)
            drawn.append(decode(model, inputs, new=8, do_sample=True, use_cache=cached))
        assert torch.equal(*drawn)


def test_rows_reset_and_copies(model: Any, mixers: dict[int, Ema]) -> None:
    ids, mask = batch((30, 19), 8)
    with farspan.patch(model, mixers=mixers):
        one, two = Feed(model, ids, mask), Feed(model, ids, mask)
        one(30), two(30)
        shared = copy.deepcopy(one.cache)
        one.cache.reorder_cache(torch.tensor([1, 0]))
        one.ids, one.mask = ids[[1, 0]], mask[[1, 0]]
        want = two(2)
        assert close(one(2), want[[1, 0]])
        one.cache, one.length, one.ids, one.mask = shared, 30, ids, mask
        assert close(one(2), want)
        layer = one.cache.layers[min(mixers)]
        assert layer.recurrent_states[0].shape == (2, 24)
        layer.batch_repeat_interleave(2)
        assert layer.recurrent_states[0].shape == (4, 24)
        layer.batch_select_indices(torch.tensor([0, 2]))
        assert layer.recurrent_states[0].shape == (2, 24)
        layer.crop(0)
        with pytest.raises(FarspanError, match="cannot be cropped"):
            layer.crop(-1)
        two.cache.reset()
        two.length = 0
        assert close(two(30), Feed(model, ids, mask)(30))


def test_a_bare_cache_and_none(model: Any, mixers: dict[int, Ema]) -> None:
    from transformers import DynamicCache

    ids, mask = batch((30, 19), 0)
    with farspan.patch(model, mixers=mixers):
        want = logits(model, {"input_ids": ids, "attention_mask": mask}, use_cache=False)
        feed = Feed(model, ids, mask)
        assert close(feed(30)[mask.bool()], want[mask.bool()])
        if model.config.model_type != "qwen3_next":  # a bare cache has no place for its own linear layers
            feed = Feed(model, ids, mask)
            feed.cache = DynamicCache()
            assert close(feed(30)[mask.bool()], want[mask.bool()])


def test_remove_puts_everything_back(model: Any, mixers: dict[int, Ema]) -> None:
    ids = prompt(2, 30)
    want, before = logits(model, ids), snapshot(model)
    own = {i: set(vars(one)) for i, one in mixers.items()}
    keys = list(model.state_dict())
    method = "dense" if len(mixers) == 3 else "quest:k=16,dense_layers=0"
    with farspan.patch(model, method, mixers=mixers):
        assert not torch.allclose(logits(model, ids), want)
        assert f"model.layers.{min(mixers)}.self_attn.v_proj.weight" in model.state_dict()
        decode(model, ids)
    assert snapshot(model) == before and list(model.state_dict()) == keys
    assert torch.equal(logits(model, ids), want)
    assert {i: set(vars(one)) for i, one in mixers.items()} == own


def test_methods_run_in_the_layers_that_are_left() -> None:
    model = make("llama")
    with farspan.patch(model, "quest:k=16,page=8,dense_layers=0", mixers={-1: Ema(64)}) as patched:
        decode(model, prompt(1, 60), new=4)
        report = patched.report()
        assert [x.layer for x in report.layers] == [0, 1] and report.mixers[0].layer == 2
        assert report.summary["decode_density"] < 0.6
        patched.reset_report()
        assert patched.report().mixers[0].calls == 0


def test_gradients_reach_the_mixer() -> None:
    model, mixer = make("llama"), Ema(64)
    with farspan.patch(model, mixers={1: mixer}):
        model(prompt(1, 20), use_cache=False).logits.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in mixer.parameters())


def test_bad_input() -> None:
    model, mixer = make("llama"), Ema(64)
    before = snapshot(model)
    for mixers, says in (
        ({3: mixer}, "from 0 to 2; got 3"),
        ({"x": mixer}, "got 'x'"),
        ({1: mixer, -2: Ema(64)}, "layer 1 twice"),
        ({1: mixer, 2: mixer}, "gives layer 2 the module of another layer"),
        ({1: nn.Linear(64, 64)}, "got a Linear for layer 1"),
        ({1: Ema(32)}, "hidden_size 32, but the model has 64"),
    ):
        with pytest.raises(SpecError, match=says):
            farspan.patch(model, mixers=mixers)
    with pytest.raises(Unsupported, match="or a mixer, so there is no layer to patch"):
        farspan.patch(model, "quest", mixers={i: Ema(64) for i in range(3)})
    with pytest.raises(SpecError, match="cannot give layer 1 a method: the mixer ema"):
        farspan.patch(model, mixers={1: mixer}, layers={1: "quest"})
    with pytest.raises(SpecError, match="names layer 0, which has no attention"):
        farspan.patch(make("qwen3_next"), mixers={0: mixer})
    assert snapshot(model) == before
    with farspan.patch(model, "dense"):
        feed = Feed(model, prompt(1, 30), torch.ones(1, 30, dtype=torch.long))
        feed(20)
    with farspan.patch(model, mixers={1: mixer}):
        with pytest.raises(FarspanError, match="holds keys or another state for layer 1"):
            feed(1)
        fresh = Feed(model, prompt(1, 30), torch.ones(1, 30, dtype=torch.long))
        fresh(20)
        with pytest.raises((FarspanError, ValueError), match="crop"):
            decode(model, prompt(1, 20).repeat(1, 2), prompt_lookup_num_tokens=4)
    other = {1: Ema(64, width=8)}
    with farspan.patch(model, mixers=other), pytest.raises(FarspanError, match="another state for layer 1"):
        fresh(1)
    with pytest.raises(FarspanError, match="holds the state of a mixer"):
        fresh(1)


def test_rope_that_mixers_do_not_have() -> None:
    """gpt-oss rotates by cos and sin of half the width; a mixer without RoPE may stand in its place."""
    model = make("gpt_oss")
    before = snapshot(model)
    geometry = Geometry(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
    says = r"cannot put the mixer retention into layer 1 of GptOss.*: its RoPE is not that of Llama"
    with pytest.raises(Unsupported, match=says):
        farspan.patch(model, mixers={1: parse_mixer("retention", geometry)})
    assert snapshot(model) == before
    for spec in ("mamba2", "gated_linear:window=0"):
        with farspan.patch(model, mixers={1: parse_mixer(spec, geometry)}):
            assert logits(model, prompt()).isfinite().all()
