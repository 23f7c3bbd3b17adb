"""The sequence mixers that MQAR compares, by spec: attention, sparse attention, mixers, and hybrids of
two; and encoder mixers."""

from __future__ import annotations

import re
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...attention.attend import attend
from ...attention.errors import FarspanError
from ...attention.hybrid import (
    EncoderMixer,
    Geometry,
    Mixer,
    encoder_mixers,
    mixers,
    parse_encoder_mixer,
    parse_mixer,
)
from ...attention.hybrid.registry import parameters_of
from ...attention.keys import Keys
from ...attention.kv import KV
from ...attention.method import PREFILL, AttentionMethod, LayerInfo
from ...attention.needs import Inputs
from ...attention.softmax import Softmax
from ...attention.spec import methods, parse_method, split_spec

SAME = "same"
ATTENTION = "attention"  # causal softmax attention over every key
LAYERS = 2
_OUTSIDE = r"(?![^()]*\))"  # not inside of parentheses


class Layer(nn.Module):
    """A sequence mixer: [N, T, dim] -> [N, T, dim]. It is called with the tokens that are no padding, [N,
    T] bool or None. Padding stands behind them, so that causal ones need not know.

    attends: whether it may have no order of its own, so that the model needs positions.
    """

    attends: bool

    @abstractmethod
    def state_bytes(self, length: int) -> int:
        """How many bytes it keeps of a sequence of ``length`` tokens."""


class Attention(Layer):
    """Softmax attention with ``heads`` heads and biased projections, over every earlier key or over those
    that ``method`` selects (its prefill, the gradient included). A method that is trained brings its gate as
    a module, whose parameters are trained where the method's output depends on them."""

    attends = True

    def __init__(
        self, dim: int, heads: int, method: AttentionMethod | None = None, *, index: int = 0
    ) -> None:
        super().__init__()
        self.heads, self.method = heads, None
        self.qkv_proj, self.o_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        for linear in (self.qkv_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if method is not None:
            self.method = _bound(method, dim, heads, index)
            self.gate = self.method.module

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        rows, length, dim = x.shape
        heads = self.qkv_proj(x).view(rows, length, 3, self.heads, dim // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).contiguous()  # each [N, heads, T, head_dim]
        if self.method is None:
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            fed = Inputs(needs=self.method.needs, q=q, k=k, hidden=x, length=length)
            keys = Keys(kv=KV(k, v), tq=length, softmax=Softmax(scale=q.shape[3] ** -0.5), fed=fed)
            out = attend(self.method, PREFILL, q, keys)[0].out.to(x.dtype)
        return self.o_proj(out.transpose(1, 2).reshape(x.shape))

    def state_bytes(self, length: int) -> int:
        return 2 * length * self.o_proj.in_features * self.o_proj.weight.element_size()


class Recurrent(Layer):
    """A mixer, which keeps a state."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer, self.attends = mixer, not mixer.ordered

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return self.mixer(x)[0]

    def state_bytes(self, length: int) -> int:
        return self.mixer.state_bytes_after(length)


class Encoded(Layer):
    """An encoder mixer, which reads the whole sequence: it keeps no less than the hidden states
    themselves."""

    attends = True

    def __init__(self, mixer: EncoderMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return self.mixer(x, real)

    def state_bytes(self, length: int) -> int:
        return length * self.mixer.hidden_size * torch.float32.itemsize


def split_mixers(values: list[str]) -> list[str]:
    """The specs of lists such as "attention,base_conv:length=16+attention", without repeats. A piece that
    begins with "par=" belongs to the spec before it."""
    specs: list[str] = []
    for value in values:
        for group in value.split(";"):
            fresh = True
            for piece in re.split(f",{_OUTSIDE}", group):
                if fresh or not re.match(r"\s*\w+\s*=", piece):
                    specs.append(piece.strip())
                else:
                    specs[-1] += "," + piece.strip()
                fresh = False
    return list(dict.fromkeys(filter(None, specs)))


def make_layers(
    spec: str, dim: int, heads: int, length: int, first: str = SAME, encoders: bool = False
) -> list[Layer]:
    """The two layers of ``spec``: "A+B" is A below B; "A" is ``first`` below A, and A twice with
    first="same".

    A and B are "attention", the spec of a method that selects in prefill, the spec of a mixer or, with
    ``encoders``, that of an encoder mixer. A mixer with a parameter ``length`` gets ``length``, that of the
    longest sequences, and one with ``heads`` these, where the spec gives none. The weights come from
    torch's global generator. Raises FarspanError for anything else, and for heads that do not divide
    ``dim``."""
    if dim < 1 or heads < 1 or dim % heads:
        raise FarspanError(
            f"{heads} heads do not divide a model of {dim} numbers: give a --dim that is a multiple of "
            "--heads."
        )
    parts = _parts(spec)
    if len(parts) == 1:
        parts = [*(parts if first == SAME else _parts(first)), *parts]
    if len(parts) > LAYERS:
        raise FarspanError(
            f"{spec!r} with {first!r} as the first layer has {len(parts)} layers, and the models have "
            f"{LAYERS}: give A or A+B, and one mixer as the first layer."
        )
    return [_layer(part, dim, heads, length, index, encoders) for index, part in enumerate(parts)]


def _parts(spec: str) -> list[str]:
    return [part.strip() for part in re.split(rf"\+{_OUTSIDE}", spec)]


def _layer(spec: str, dim: int, heads: int, length: int, index: int, encoders: bool) -> Layer:
    name, parameters = split_spec(spec)
    if name == ATTENTION:
        if ":" in spec:
            raise FarspanError(f"{ATTENTION} takes no parameters; got {spec!r}.")
        return Attention(dim, heads)
    known: dict[str, type[Mixer] | type[EncoderMixer]] = {
        **mixers(),
        **(encoder_mixers() if encoders else {}),
    }
    if name in known:
        given = {piece.partition("=")[0].strip() for piece in parameters.split(",")}
        takes = parameters_of(known[name]).keys() - given
        more = [f"{key}={value}" for key, value in (("length", length), ("heads", heads)) if key in takes]
        spec = f"{name}:" + ",".join(filter(None, (parameters, *more)))
        if name in encoder_mixers():
            return Encoded(parse_encoder_mixer(spec, dim))
        geometry = Geometry(hidden_size=dim, num_heads=heads, num_kv_heads=heads, head_dim=dim // heads)
        return Recurrent(parse_mixer(spec, geometry))
    if name in methods():
        return Attention(dim, heads, parse_method(spec), index=index)
    if name in encoder_mixers():
        raise FarspanError(
            f"{name} reads later tokens, and the queries of MQAR are asked of what came before: compare it "
            "with farspan eval listops."
        )
    raise FarspanError(
        f"There is no sequence mixer {name!r}: give {ATTENTION}, one of the mixers {', '.join(known)}, a "
        "method that selects in prefill (farspan methods lists them), or two of them as A+B."
    )


def _bound(method: AttentionMethod, dim: int, heads: int, index: int) -> AttentionMethod:
    """``method`` as layer ``index`` runs it."""
    if not method.selective or PREFILL not in method.phases:
        raise FarspanError(
            f"{method.name} selects nothing in prefill, which is how these models are trained: give "
            f"{ATTENTION}, or a method with a prefill."
        )
    if method.lookahead.is_prompt:
        raise FarspanError(
            f"{method.name} selects by the last queries of the sequence, so that earlier ones would see the "
            "future: give a method with a shorter lookahead."
        )
    layer = LayerInfo(
        index=index,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim // heads,
        hidden_size=dim,
        num_layers=LAYERS,
    )
    bound = method.for_training(layer) if method.trains else method.for_layer(layer)
    if bound is None:
        raise FarspanError(f"{method} leaves layer {index} dense: give {ATTENTION} there.")
    return bound


def check_mixers(specs: list[str], dims: list[int], heads: int, first: str, encoders: bool = False) -> None:
    """Raises FarspanError for the first spec that cannot be made in one of the sizes."""
    with torch.random.fork_rng(devices=[]):
        for spec in specs:
            for dim in dims:
                make_layers(spec, dim, heads, 4, first, encoders)
