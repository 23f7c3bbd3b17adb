"""The projections of an attention module by their usual names, and its geometry: what a mixer starts from."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.errors import Unsupported
from ...attention.hybrid.geometry import Geometry
from ...attention.hybrid.projections import rotate
from ...attention.method import LayerInfo
from .inputs import applies_rope_conditionally, mentions_rope
from .models import ModelInfo

_OUT = ("o_proj", "out_proj", "dense")
_FUSED = "qkv_proj"  # Phi-3: queries, keys and values side by side
_KNOWN = {"q_proj", "k_proj", "v_proj", "q_norm", "k_norm", _FUSED, *_OUT}


def geometry_of(info: ModelInfo, index: int) -> Geometry:
    """The geometry of the attention of layer ``index``, which may be on torch's meta device. A soft-cap of
    scores is not part of it: mixers begin without it.

    Raises Unsupported, with the reasons, for attention whose weights a mixer cannot start from."""
    module, layer = info.attention[index], info.layer_info(index)
    reasons = _reasons(info, module, layer)
    if reasons:
        raise Unsupported(f"farspan cannot convert layer {index} of {type(info.model).__name__}", reasons)
    first, out = _linear(module, "q_proj", _FUSED), _linear(module, *_OUT)
    assert first is not None and out is not None
    norm = getattr(module, "q_norm", None)
    eps = next((x for m in (norm, *info.decoder.modules()) if (x := _eps(m)) is not None), 1e-5)
    scale = getattr(module, "scaling", None)
    return Geometry(
        hidden_size=layer.hidden_size,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        bias=first.bias is not None,
        out_bias=out.bias is not None,
        qk_norm=norm is not None,
        scale=None if scale is None else float(scale),
        eps=eps,
    )


def attention_weights(info: ModelInfo, index: int) -> dict[str, Tensor]:
    """The weights of the attention of layer ``index`` as ``Mixer.initialise_from`` takes them: q_proj,
    k_proj, v_proj, o_proj, and q_norm and k_norm as factors of the normalised numbers."""
    geometry, module = geometry_of(info, index), info.attention[index]
    sizes = [geometry.num_heads, geometry.num_kv_heads, geometry.num_kv_heads]
    rows = [n * geometry.head_dim for n in sizes]
    found: dict[str, Tensor] = {}
    fused = getattr(module, _FUSED, None)
    for at, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for kind in ("weight", "bias"):
            whole = getattr(getattr(module, name) if fused is None else fused, kind)
            if whole is not None:
                found[f"{name}.{kind}"] = whole if fused is None else whole.split(rows)[at]
    out = _linear(module, *_OUT)
    assert out is not None
    found |= {f"o_proj.{name}": p for name, p in out.named_parameters()}
    for name in ("q_norm", "k_norm") if geometry.qk_norm else ():
        found[f"{name}.weight"] = _factors(getattr(module, name), geometry)
    return {name: x.detach() for name, x in found.items()}


@torch.no_grad()
def _factors(norm: nn.Module, geometry: Geometry) -> Tensor:
    """What a norm multiplies the normalised numbers with: its weight, or 1 + its weight (Gemma)."""
    weight = next(norm.parameters())
    ones = torch.ones(geometry.head_dim, dtype=weight.dtype, device=weight.device)
    factors: Tensor = norm(ones).float() * (1 + geometry.eps) ** 0.5
    return factors


def _reasons(info: ModelInfo, module: nn.Module, layer: LayerInfo) -> list[str]:
    if info.weights_mesh is not None:
        return ["its heads are sharded by tensor parallelism; convert the whole model in one process"]
    fused, size = getattr(module, _FUSED, None), layer.head_dim
    wanted = {"q_proj": layer.num_heads, "k_proj": layer.num_kv_heads, "v_proj": layer.num_kv_heads}
    if fused is not None:
        wanted = {_FUSED: sum(wanted.values())}
    reasons = []
    for name, heads in wanted.items():
        one = _linear(module, name)
        if one is None:
            reasons.append(f"it has no {name} that is an nn.Linear with floating-point weights")
        elif one.out_features != heads * size:
            reasons.append(f"its {name} has {one.out_features} outputs, not {heads} heads of {size}")
    if (out := _linear(module, *_OUT)) is None:
        reasons.append("it has no output projection that is an nn.Linear with floating-point weights")
    elif out.in_features != layer.num_heads * size:
        reasons.append(f"its output projection takes {out.in_features} numbers, not {layer.num_heads} heads")
    norm: Any = getattr(module, "q_norm", None)
    if norm is not None and [p.shape for p in norm.parameters()] != [(size,)]:
        reasons.append("its q_norm is not one over the numbers of a head")
    if lost := sorted({name.partition(".")[0] for name, _ in module.named_parameters()} - _KNOWN):
        reasons.append(f"its {', '.join(lost)} would be lost, because no mixer has them")
    return [*reasons, *rope_reasons(module)]


def _linear(module: nn.Module, *names: str) -> nn.Linear | None:
    """The first child of these names, where it is a linear layer with plain weights."""
    found = next((x for name in names if (x := getattr(module, name, None)) is not None), None)
    plain = isinstance(found, nn.Linear) and found.weight.is_floating_point()
    return found if plain else None


def has_rope(attention: nn.Module) -> bool:
    """Whether this layer may apply RoPE; some models have layers without it (SmolLM3). A mixer in its place
    gets cos and sin only then."""
    return bool(getattr(attention, "use_rope", True)) and mentions_rope(type(attention))


def rope_reasons(attention: nn.Module) -> list[str]:
    """Why a mixer cannot apply RoPE as this attention does."""
    own = type(attention)
    if not has_rope(attention):
        return []
    if not hasattr(attention, "use_rope") and applies_rope_conditionally(own.forward):
        return ["it applies RoPE only under a condition, which farspan does not know"]
    turn = getattr(inspect.getmodule(own), "apply_rotary_pos_emb", None)
    if turn is None or not _turns_halves(turn):
        return ["its RoPE is not that of Llama, by which mixers turn the halves of a head"]
    return []


@functools.cache
def _turns_halves(turn: Callable[..., Any]) -> bool:
    """Whether an ``apply_rotary_pos_emb`` pairs number i of a head with number i + D / 2, for cos and sin of
    D numbers. Cohere's and GLM's pair neighbours; that of gpt-oss takes cos and sin of D / 2 numbers."""
    with torch.device("cpu"), torch.no_grad():
        x = torch.arange(24, dtype=torch.float32).view(1, 3, 1, 8)  # [B, T, heads, D]
        angles = torch.arange(12, dtype=torch.float32).view(1, 3, 4).repeat(1, 1, 2)
        rotary, heads = (angles.cos(), angles.sin()), x.transpose(1, 2)
        try:
            q, k = turn(heads, heads, *rotary)
        except Exception:  # a function of this name that takes or returns something else
            return False
        want = rotate(x, rotary).transpose(1, 2)
        return all(y.shape == want.shape and torch.allclose(y, want, atol=1e-5) for y in (q, k))


def _eps(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, float) else None
