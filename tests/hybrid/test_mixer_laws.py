"""The laws that every registered mixer obeys."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import Tensor

from farspan import SpecError
from farspan.attention.hybrid import Geometry, Mixer, mixers, parse_mixer

from .tools import GEOMETRY, SPECS, close, equal, make, part, random, rotary, row, same, tolerance

T = 40


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mixer(spec: str) -> Mixer:
    return make(spec)


@pytest.fixture
def mask() -> Tensor:
    """Padding left, right, on both sides, between tokens, and everywhere."""
    mask = torch.ones(6, T, dtype=torch.bool)
    mask[1, :23] = mask[2, 31:] = mask[3, :7] = mask[3, 20:] = mask[4, 9:12] = mask[4, 30] = mask[5] = False
    return mask


@torch.no_grad()
def test_segments_and_steps(mixer: Mixer) -> None:
    x, turn = random(2, T, 32), rotary(T)
    whole, end = mixer(x, None, None, turn)
    state, outs = None, []
    for a, b in itertools.pairwise((0, 1, 3, 10, 27, 28, T)):
        out, state = mixer(x[:, a:b], state, None, part(turn, a, b))
        outs.append(out)
    assert close(torch.cat(outs, 1), whole) and same(mixer, state, end)
    state, outs = mixer.initial_state(2, x.device), []
    for t in range(T):
        before = tuple(s.clone() for s in state)
        out, after = mixer.step(x[:, t], state, part(turn, t, t + 1))
        assert equal(state, before), "changed in place"
        state = after
        outs.append(out)
    assert close(torch.stack(outs, 1), whole) and same(mixer, state, end)


@torch.no_grad()
def test_causality_and_batch(mixer: Mixer) -> None:
    x, turn = random(3, T, 32), rotary(T)
    out, state = mixer(x, None, None, turn)
    for i in range(3):
        alone, end = mixer(x[i : i + 1], None, None, turn)
        assert close(out[i : i + 1], alone) and same(mixer, row(mixer, state, i), end)
    x[:, 25:] = random(3, T - 25, 32, seed=1)
    changed, _ = mixer(x, None, None, turn)
    assert close(changed[:, :25], out[:, :25]) and not close(changed[:, 25:], out[:, 25:])


@pytest.mark.parametrize("cuts", [(0, T), (0, 5, 10, 21, 30, T)], ids=["whole", "split"])
@torch.no_grad()
def test_padding(mixer: Mixer, mask: Tensor, cuts: tuple[int, ...]) -> None:
    """Rows with padding are the rows alone; a call with nothing but padding leaves a row's state."""
    x = random(6, T, 32)
    x[~mask] *= 1e4
    turn, state, outs = rotary(T, mask), None, []
    for a, b in itertools.pairwise(cuts):
        before = mixer.initial_state(6, x.device) if state is None else state
        out, state = mixer(x[:, a:b], state, mask[:, a:b], part(turn, a, b))
        assert bool(out.isfinite().all())
        outs.append(out)
        for i in range(6):
            if not mask[i, a:b].any():
                assert equal(row(mixer, state, i), row(mixer, before, i)), "padding changed the state"
    got = torch.cat(outs, 1)
    for i in range(5):
        real = mask[i]
        alone, end = mixer(x[i : i + 1, real], None, None, rotary(int(real.sum())))
        assert close(got[i : i + 1, real], alone) and same(mixer, row(mixer, state, i), end)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_padding_may_hold_anything(mixer: Mixer, mask: Tensor, dtype: torch.dtype) -> None:
    """NaN at padding reaches no other token and no state, and no gradient is NaN."""
    mixer = mixer.to(dtype)
    x, turn = random(6, T, 32).to(dtype), tuple(z.to(dtype) for z in rotary(T, mask))
    want, end = mixer(x, None, mask, turn)
    torch.where(mask[..., None], want, 0).float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters() if p.grad is not None)
    got, after = mixer(x.masked_fill(~mask[..., None], torch.nan), None, mask, turn)
    assert torch.equal(got[mask], want[mask]) and equal(after, end)


@torch.no_grad()
def test_padding_in_the_middle_of_a_conversation(mixer: Mixer, mask: Tensor) -> None:
    """A call that begins with a state may have padding too."""
    x, turn = random(6, T, 32), rotary(2 * T)
    _, state = mixer(x, None, None, part(turn, 0, T))
    y = random(6, T, 32, seed=1)
    places = (mask.cumsum(1) - 1).clamp(min=0) + T
    cos, sin = (z[0][places] for z in turn)
    out, after = mixer(y, state, mask, (cos, sin))
    for i in range(6):
        n = int(mask[i].sum())
        if n == 0:
            assert equal(row(mixer, after, i), row(mixer, state, i))
            continue
        alone, end = mixer(y[i : i + 1, mask[i]], row(mixer, state, i), None, part(turn, T, T + n))
        assert close(out[i : i + 1, mask[i]], alone) and same(mixer, row(mixer, after, i), end)


@torch.no_grad()
def test_shards_advance_the_state(mixer: Mixer, mask: Tensor) -> None:
    """What a mixer over ranks rests on: the state after a shard, from its transition and the state before."""
    if mixer.halo is None:
        with pytest.raises(NotImplementedError):
            mixer.transition(random(1, 4, 32), mixer.initial_state(1, torch.device("cpu")))
        return
    x, turn = random(6, T, 32), rotary(T, mask)
    state = mixer.initial_state(6, x.device)
    inner = 0 if mixer.inner is None else len(mixer.inner.layout)  # parts that the inner mixer advances
    for a, b in itertools.pairwise((0, 16, 17, 30, T)):
        now = part(turn, a, b)
        want = mixer(x[:, a:b], state, mask[:, a:b], now)[1]
        local = mixer.initial_state(6, x.device)
        if a:  # from the tokens before the shard, without the first five where no halo reaches them
            far = (mask[:, 5:a].sum(1) >= mixer.halo) | ~mask[:, :5].any(1)
            begin = 5 if bool(far.all()) else 0
            local = mixer.skip(local, mask[:, :begin].sum(1))
            local = mixer(x[:, begin:a], local, mask[:, begin:a], part(turn, begin, a))[1]
        local = (*state[:inner], *local[inner:])
        got = mixer.advance(state, mixer.transition(x[:, a:b], local, mask[:, a:b], now))
        assert same(mixer, (*want[:inner], *got[inner:]), want)
        state = want


@torch.no_grad()
def test_the_state_has_the_declared_sizes(spec: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        mixer = make(spec).to(dtype)
        x = random(2, 9, 32).to(dtype)
        turn = tuple(z.to(dtype) for z in rotary(9))
        out, state = mixer(x, None, None, turn)
        one, next_state = mixer.step(x[:, 0], state, tuple(z[:, :1] for z in turn))
        assert out.dtype == one.dtype == dtype and one.shape == (2, 32)
        fixed = len(mixer.state_shapes)
        for s, tokens in ((mixer.initial_state(2, x.device), 0), (state, 9), (next_state, 10)):
            assert tuple(tuple(z.shape[1:]) for z in s[:fixed]) == mixer.state_shapes
            assert all(z.dtype == mixer.state_dtype and len(z) == 2 for z in s[:fixed])
            assert sum(z.nbytes for z in row(mixer, s, 0)) == mixer.state_bytes_after(tokens)
            assert tokens == 0 or all(z.untyped_storage().nbytes() == z.nbytes for z in s), "a view"
    assert mixer.hidden_size == 32 and mixer.name == spec.partition(":")[0]


@torch.no_grad()
def test_half_precision(mixer: Mixer) -> None:
    x, turn = random(1, T, 32), rotary(T)
    mixer, x = mixer.bfloat16(), x.bfloat16()
    turn = tuple(z.bfloat16() for z in turn)
    got, _ = mixer(x, None, None, turn)
    want, _ = mixer.double()(x.double(), None, None, tuple(z.double() for z in turn))
    assert (got - want).norm() <= tolerance(mixer) * want.norm()


def test_gradients(mixer: Mixer, mask: Tensor) -> None:
    """They reach every parameter, the inputs and the state, and a padding token has none."""
    x = random(6, T, 32).requires_grad_()
    _, state = mixer(x[:, :20], None, mask[:, :20], part(rotary(T, mask), 0, 20))
    out, _ = mixer(x[:, 20:], state, mask[:, 20:], part(rotary(T, mask), 20, T))
    torch.where(mask[:, 20:, None], out, 0).square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.abs().sum() > 0), name
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert bool(x.grad[0, :20].any()), "through the state"
    assert not x.grad[~mask].any()


def attention_weights(geometry: Geometry, bias: bool = False) -> dict[str, Tensor]:
    """What ``initialise_from`` gets, at random."""
    d, hidden = geometry.head_dim, geometry.hidden_size
    out = {"q": geometry.num_heads * d, "k": geometry.num_kv_heads * d, "v": geometry.num_kv_heads * d}
    made = {f"{n}_proj.weight": random(s, hidden, seed=i) for i, (n, s) in enumerate(out.items())}
    made["o_proj.weight"] = random(hidden, out["q"], seed=3)
    if bias:
        made |= {f"{n}_proj.bias": random(s, seed=i) for i, (n, s) in enumerate(out.items())}
        made |= {"o_proj.bias": random(hidden, seed=4)}
        made |= {f"{n}_norm.weight": random(d, seed=i) for i, n in enumerate("qk")}
    return made


@pytest.mark.parametrize("name", mixers())
def test_begins_with_the_weights_of_the_attention(name: str) -> None:
    geometry = Geometry(
        hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, bias=True, out_bias=True, qk_norm=True
    )
    mixer, weights = parse_mixer(name, geometry).double(), attention_weights(geometry, bias=True)
    mixer.initialise_from(weights)
    own = mixer.state_dict()
    shared = own.keys() & weights.keys()
    assert all(torch.equal(own[key], weights[key]) for key in shared if own[key].shape == weights[key].shape)
    if hasattr(mixer, "q_proj"):
        assert {key for key in weights if "proj" in key} <= shared
    out = mixer(random(2, T, 32), None, None, rotary(T))[0].detach()
    assert bool(out.isfinite().all()) and 0.01 < float(out.std()) < 100


@torch.no_grad()
def test_saved_and_loaded(spec: str, mixer: Mixer) -> None:
    file = io.BytesIO()
    torch.save(mixer.state_dict(), file)
    file.seek(0)
    other = make(spec, seed=1)
    other.load_state_dict(torch.load(file))
    x, turn = random(1, T, 32), rotary(T)
    assert torch.equal(mixer(x, None, None, turn)[0], other(x, None, None, turn)[0])


@pytest.mark.parametrize("name", mixers())
def test_bad_input(name: str) -> None:
    with pytest.raises(SpecError, match="whole number of query heads per KV head"):
        Geometry(hidden_size=32, num_heads=3, num_kv_heads=2, head_dim=8)
    with pytest.raises(SpecError, match="has no parameter 'nothing'"):
        parse_mixer(f"{name}:nothing=1", GEOMETRY)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (None, "A mixer is a string such as"),
        ("mamba2:expand=nan", "mamba2 takes headdim, state and conv"),
        ("mamba2:expand=2.01", "mamba2 takes headdim, state and conv"),
        ("mamba2:expand=1e300", "cannot be made"),
        ("mamba2:state=16", "headdim and state with expand alone"),
        ("gated_linear:window=0,features=plain", "features with a window alone"),
        ("gated_delta:expand_v=inf", "gated_delta takes conv >= 1"),
        ("gated_linear:expand_k=inf", "gated_linear takes window >= 0"),
        ("gated_linear:window=1000000000000", "bytes of each sequence"),
        ("retention:expand_v=nan", "retention takes an expand_v"),
        ("base_conv:length=1000000000000000000000", "cannot be made"),
    ],
)
def test_sizes_that_cannot_be(spec: str, sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        parse_mixer(spec, GEOMETRY)
