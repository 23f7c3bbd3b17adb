"""Record the inputs that methods are fed: hidden states, also those of an earlier layer, and queries and keys
before RoPE.

Hooks on ``q_proj`` and ``k_proj`` would miss fused projections (Phi-3) and the norms after the projections
(Qwen3). So RoPE is undone: the module's own ``apply_rotary_pos_emb`` rotates by the opposite angle. The
result is divided by cos² + sin², because YaRN scales both. The angles of any position, also of keys from
earlier calls, come from the model's own rotary embedding.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.errors import FarspanError, Unsupported
from ...attention.needs import Needs
from ..inputs import Given
from ..layer import Session
from .hooks import Hook
from .models import ModelInfo
from .transformers_private import source_of

_BY_LENGTH = ("dynamic", "longrope")  # types of RoPE whose angles depend on the length of the call


class RotaryCall:
    """The arguments of one call of a rotary embedding, so that it can be repeated for other positions."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        given.pop("self", None)
        given.pop("x", None)
        self.module, self.positions, self.settings = module, given.pop("position_ids"), given
        self._cos = weakref.ref(output[0])
        self._frequencies: Tensor | None = None

    def returned(self, cos: Tensor) -> bool:
        """Whether ``cos`` is the tensor that this call returned."""
        return self._cos() is cos

    @torch.no_grad()
    def angles(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [B, n], in the dtype and on the device of ``like``."""
        cos, sin = self.module.forward(like, position_ids=positions, **self.settings)
        return cos, sin

    def frequencies(self, like: Tensor) -> Tensor:
        """[R] float32, descending: the radians by which each pair of numbers is rotated per position, which
        are below pi. They are the angles of position 1. Most models have the angle of each pair twice."""
        if self._frequencies is None:
            one = torch.ones(1, 1, dtype=torch.long, device=like.device)
            cos, sin = self.angles(like[:1, :1].float(), one)
            angles = torch.atan2(sin, cos).flatten().sort(descending=True).values
            twice = torch.equal(angles[::2], angles[1::2])
            self._frequencies = angles[::2] if twice else angles
        return self._frequencies


def feed_inputs(info: ModelInfo, layers: Mapping[int, Needs], session: Session) -> list[Callable[[], None]]:
    """Store the inputs of the attention modules of these layers in ``session.given`` while they run. layers:
    by layer, the needs of its methods. Returns the undo steps. Raises Unsupported where RoPE cannot be
    undone, and where a layer whose hidden states are needed has no attention."""
    undo: list[Callable[[], None]] = []
    decoder, modules = info.decoder, [(info.attention[i], needs) for i, needs in layers.items()]
    earlier = {needs.early_hidden_states for needs in layers.values()}
    for early in sorted(layer for layer in earlier if layer is not None):
        if early not in info.attention:
            raise Unsupported(
                f"farspan cannot give the hidden states of layer {early}",
                ["that layer has no attention module"],
            )
        keep = Hook(partial(_keep_hidden_states, session, early))
        undo.append(info.attention[early].register_forward_pre_hook(keep, with_kwargs=True).remove)
    served = [(module, needs, _rotation(decoder, module, needs)) for module, needs in modules]
    if any(rotate is not None for _, _, rotate in served):
        for rotary in _rotaries(decoder):
            after = Hook(partial(_after_rotary, session))
            undo.append(rotary.register_forward_hook(after, with_kwargs=True).remove)
    for module, needs, rotate in served:
        before = Hook(partial(_before_attention, session, needs, rotate))
        undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.append(
            module.register_forward_hook(Hook(partial(_after_attention, session)), always_call=True).remove
        )
    return undo


def _rotaries(decoder: nn.Module) -> list[nn.Module]:
    return [module for module in decoder.modules() if hasattr(module, "rope_type")]


def _rotation(decoder: nn.Module, module: nn.Module, needs: Needs) -> Callable[..., Any] | None:
    """The function by which a module rotates queries and keys. None where no method needs RoPE undone, or
    where the module has no RoPE. Raises Unsupported where RoPE cannot be undone."""
    if not needs.before_rope or not getattr(module, "use_rope", True):
        return None
    own = type(module)
    rotate = getattr(inspect.getmodule(own), "apply_rotary_pos_emb", None)
    given = "position_embeddings" in inspect.signature(own.forward).parameters
    if not given and (rotate is None or not mentions_rope(own)):
        return None
    rotaries = _rotaries(decoder)
    if given and not rotaries and getattr(decoder, "rotary_emb", module) is None:
        return None  # a config without RoPE, for a class that can have it
    kinds = [r.rope_type for r in rotaries]
    types = {x for kind in kinds for x in (kind.values() if isinstance(kind, dict) else [kind])}
    reasons = []
    if rotate is None or not given or not rotaries:
        reasons.append("its rotation is not transformers' apply_rotary_pos_emb of position_embeddings")
    elif not hasattr(module, "use_rope") and applies_rope_conditionally(own.forward):
        reasons.append("it applies RoPE only under a condition, which farspan does not know")
    reasons += [
        f"its RoPE of type {name!r} depends on the length of each call and cannot be undone for stored keys"
        for name in _BY_LENGTH
        if name in types
    ]
    if reasons:
        raise Unsupported(f"farspan cannot give queries and keys before RoPE in {own.__name__}", reasons)
    return rotate


def mentions_rope(own: type) -> bool:
    """Whether any method of a class names a rotation; true where its source is not available. Nemotron-H's
    attention has no RoPE, though its file has the function."""
    sources = [source_of(f) for f in vars(own).values() if inspect.isfunction(f)]
    return any(source is None or re.search("rotary|rope", source, re.IGNORECASE) for source in sources)


def applies_rope_conditionally(forward: Callable[..., Any]) -> bool:
    """Whether a forward applies RoPE inside a conditional branch, other than one for the case that it is
    given position embeddings."""
    source = source_of(forward)
    if source is None:
        return False
    source = inspect.cleandoc("\n" + source)
    body = re.search(r"^( +)\S", source[source.index(":\n") :], re.MULTILINE)
    call = re.search(r"^( +).*apply_rotary_pos_emb\(", source, re.MULTILINE)
    if body is None or call is None or len(call[1]) <= len(body[1]):
        return False
    around = re.findall(rf"^(?! {{{len(call[1])}}}) *(\S.*)$", source[: call.start()], re.MULTILINE)
    return around[-1] != "if position_embeddings is not None:"


def _after_rotary(
    session: Session, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    call = RotaryCall(module, args, kwargs, output)
    session.rotary_calls[(id(module), repr(call.settings))] = call


def _keep_hidden_states(
    session: Session, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    if session.early is not None:  # not where gradient checkpointing repeats the layer
        session.early[index] = given["hidden_states"]


def _before_attention(
    session: Session,
    needs: Needs,
    rotate: Callable[..., Any] | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    hidden = given["hidden_states"]
    early = None
    if needs.early_hidden_states is not None and session.early is not None:
        early = session.early.get(needs.early_hidden_states)
    if rotate is None or given["position_embeddings"] is None:
        session.given = Given(needs, hidden, early=early)
        return
    call = _find_rotary_call(list(session.rotary_calls.values()), given["position_embeddings"][0])
    if call.positions.dim() != 2:
        raise FarspanError(
            f"A method needs queries or keys before RoPE, but {type(module).__name__} rotates by positions "
            f"with {call.positions.dim() - 1} axes, which farspan cannot undo: choose another method."
        )
    undo = partial(_undo, rotate, call, hidden)
    session.given = Given(needs, hidden, call.positions, undo, call.frequencies(hidden), early)


def _find_rotary_call(calls: Sequence[RotaryCall], cos: Tensor) -> RotaryCall:
    """The call of a rotary embedding that returned ``cos``. accelerate may have copied cos to another device;
    then it is the only call that there is."""
    found = [call for call in calls if call.returned(cos)] or list(calls)
    if len(found) != 1:
        raise FarspanError(
            "A method needs queries or keys before RoPE, but farspan cannot find the rotary embedding that "
            "rotated them in this call: choose another method, or load the model without device_map."
        )
    return found[0]


def _undo(rotate: Callable[..., Any], call: RotaryCall, like: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """Undo the rotation of x [B, heads, n, D] by positions [B, n]; the result has the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(device=x.device, dtype=wide) for part in call.angles(like, positions))
    size, turned = cos**2 + sin**2, x.to(wide)
    before, _ = rotate(turned, turned[:, :1], cos / size, -sin / size)
    return before.to(x.dtype)


def _after_attention(session: Session, *_: Any) -> None:
    session.given = None
