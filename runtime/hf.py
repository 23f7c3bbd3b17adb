"""The only file that touches transformers' internals: interfaces, masks, cache classes, hooks.

Nothing here happens on import. ``install`` changes a model and returns the list of undo steps; what cannot be
served is refused by ``inspect_model`` before anything is changed. Checked on transformers 5.21 to 5.23.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)
from transformers.masking_utils import causal_mask_function

from ..attention.errors import FarspanError, Unsupported
from ..attention.method import LayerInfo
from .cache import KVStore
from .layer import DECODE_ROWS, Layer, Session

NAME = "farspan"  # free of "flash", "sdpa" and "flex_attention", which trigger special paths in transformers
ATTRIBUTE = "_farspan"

FULL, SLIDING, LINEAR, HYBRID = "full_attention", "sliding_attention", "linear_attention", "hybrid"
_WITHOUT_ATTENTION = (LINEAR, "conv", "mamba", "dummy")


# --- what transformers calls --------------------------------------------------------------------------------


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, Tq, D], key and value [B, Hkv, Tk, D] after RoPE and
    cache."""
    layer: Layer | None = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise FarspanError(
            f"{type(module).__name__} is set to farspan's attention but not patched: use farspan.patch."
        )
    if dropout:
        raise FarspanError(
            f"farspan has no attention dropout; set the model's attention_dropout to 0 (it is {dropout})."
        )
    if kwargs.get("position_bias") is not None:
        raise FarspanError(f"farspan cannot add the position bias that {type(module).__name__} asks for.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window
    out = layer(query, key, value, attention_mask, scale=scale, window=window, softcap=softcap, sinks=s_aux)
    return out, None


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: the 2-D padding mask of the keys at hand, never an N x N tensor.

    Causality and windows are the operations' own, so only those two mask functions can be served.
    """
    if mask_function is not causal_mask_function and not _is_sliding(mask_function):
        raise FarspanError(
            "This call wants a mask beyond causal attention, a sliding window and left padding (packed "
            "sequences, a "
            "bidirectional prefix or image tokens), which farspan does not serve."
        )
    return None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]


def _is_sliding(mask_function: Callable[..., Any]) -> bool:
    """Whether this is transformers' sliding_window_causal_mask_function(w): an and of a window and causality,
    no more."""
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    pair = next((p for p in parts if isinstance(p, tuple)), ())
    names = {getattr(p, "__qualname__", "").split(".")[0] for p in pair}
    return (
        len(pair) == 2
        and causal_mask_function in pair
        and names == {"causal_mask_function", "sliding_window_overlay"}
    )


def _register() -> None:
    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, _attention_forward)
        AttentionMaskInterface.register(NAME, _padding_mask)


# --- storage under every call -------------------------------------------------------------------------------


class KVStoreLayer(DynamicLayer):
    """A KVStore as a transformers cache layer."""

    def __init__(self, **kwargs: Any) -> None:
        self.store = KVStore()
        super().__init__(**kwargs)

    # transformers reads and sets these as plain attributes
    @property
    def keys(self) -> Tensor | None:
        return self.store.keys

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign(value)

    @property
    def values(self) -> Tensor | None:
        return self.store.values

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign(value)

    @property
    def is_initialized(self) -> bool:
        return self.store.keys is not None

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        pass  # follows from the store

    @staticmethod
    def _assign(value: Tensor | None) -> None:
        if value is not None:
            raise FarspanError(
                "The keys of a farspan cache layer are changed through update, crop, reorder_cache or reset."
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.store.append(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.store.length

    def reset(self) -> None:
        self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove; got {tokens_to_remove}.")
        self.store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select(indices)

    def offload(self) -> None:
        raise FarspanError(
            "farspan does not serve an offloaded cache: pass no cache, or a DynamicCache without offloading."
        )

    prefetch = offload


class HybridStoreLayer(KVStoreLayer, LinearAttentionAndFullAttentionLayer):
    """The cache layer of a block with a recurrent mixer and attention side by side (Falcon-H1)."""

    def __init__(self, number_of_states: int = 1, **kwargs: Any) -> None:
        self.store = KVStore()
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if args:
            KVStoreLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        KVStoreLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.store.reorder(beam_idx)


_KEPT = (
    KVStoreLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def adopt_cache(cache: Cache) -> None:
    """Give a user's cache our storage, in place and with its contents. Refuses what cannot be adopted."""
    replicated = getattr(cache, "layer_class_to_replicate", None)
    if getattr(cache, "offloading", False) or not isinstance(getattr(cache, "layers", None), list):
        what = "an offloading cache" if isinstance(cache, Cache) else f"a {type(cache).__name__}"
        raise FarspanError(
            f"farspan serves transformers' DynamicCache, not {what}: pass no cache, or "
            "DynamicCache(config=...)."
        )
    if replicated not in (None, DynamicLayer, KVStoreLayer):
        raise _wrong_cache(cache, replicated)
    fresh: list[Any] = []
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            fresh.append(_filled(KVStoreLayer(), layer))
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            hybrid = HybridStoreLayer.__new__(HybridStoreLayer)
            hybrid.store = KVStore()
            hybrid.__dict__.update(
                {k: v for k, v in vars(layer).items() if k not in ("keys", "values", "is_initialized")}
            )
            fresh.append(_filled(hybrid, layer))
        elif isinstance(layer, _KEPT) or type(layer).__name__ == "DummyLayer":
            fresh.append(layer)
        else:
            raise _wrong_cache(cache, type(layer))
    cache.layers[:] = fresh
    if replicated is DynamicLayer:
        cache.layer_class_to_replicate = KVStoreLayer


def _filled(new: KVStoreLayer, old: DynamicLayer) -> KVStoreLayer:
    if old.is_initialized and old.get_seq_length() > 0:
        new.update(old.keys, old.values)
    return new


def _wrong_cache(cache: Cache, layer: type) -> FarspanError:
    return FarspanError(
        f"farspan cannot serve a {type(cache).__name__} of {layer.__name__}s: pass no cache, or "
        "DynamicCache(config=model.config)."
    )


# --- which models can be served -----------------------------------------------------------------------------


@dataclass
class ModelInfo:
    """What patching needs to know of a model: its decoder, and its attention modules by layer."""

    decoder: nn.Module
    config: Any
    attention: dict[int, nn.Module]
    kinds: list[str]

    @property
    def geometry(self) -> dict[str, Any]:
        """What a recipe must match: architecture and sizes."""
        first = self.layer_info(min(self.attention))
        return {
            "model_type": self.config.model_type,
            "num_layers": len(self.kinds),
            "hidden_size": self.config.hidden_size,
            "vocab_size": self.config.vocab_size,
            "num_heads": first.num_heads,
            "num_kv_heads": first.num_kv_heads,
            "head_dim": first.head_dim,
        }

    def layer_info(self, index: int) -> LayerInfo:
        """Head counts and size of one layer."""
        heads = self.config.num_attention_heads
        group = int(getattr(self.attention[index], "num_key_value_groups", 1))
        head_dim = getattr(self.attention[index], "head_dim", None) or self.config.hidden_size // heads
        return LayerInfo(index=index, num_heads=heads, num_kv_heads=heads // group, head_dim=int(head_dim))


def is_patched(model: nn.Module) -> bool:
    """Whether some layer of the model carries a patch."""
    return any(ATTRIBUTE in vars(m) for m in model.modules())


def inspect_model(model: Any) -> ModelInfo:
    """Find what patching needs, or raise Unsupported with every reason why this model cannot be served."""
    if not isinstance(model, nn.Module) or not hasattr(model, "get_decoder"):
        raise Unsupported(
            f"farspan cannot patch a {type(model).__name__}",
            ["it patches transformers' causal LMs (a PreTrainedModel)"],
        )
    decoder = cast(Any, model).get_decoder()
    config = decoder.config
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("encoder-decoder models are not causal LMs")
    if getattr(config, "kv_lora_rank", None):
        reasons.append("latent attention (MLA) does not attend to the keys and values a cache holds")
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
        reasons.append("layers that share another layer's keys are not served")
    if any(getattr(getattr(m, "config", None), "output_attentions", False) for m in (model, decoder)):
        reasons.append("its config asks for output_attentions, and farspan never makes attention weights")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        reasons.append("its attention is bidirectional")
    modules = [m for m in decoder.modules() if _is_attention(m)]
    attention = {m.layer_idx: m for m in modules}
    if not attention:
        reasons.append("no module of it calls attention through transformers' AttentionInterface")
    if not all(map(_is_causal, modules)):
        reasons.append("some of its attention is not causal (an encoder's, or cross-attention)")
    elif len(attention) < len(modules):
        reasons.append("some of its layers have more than one attention module")
    kinds: list[str] = []
    if not reasons:
        kinds = get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0]
        known = (FULL, SLIDING, HYBRID, *_WITHOUT_ATTENTION)
        reasons += [f"layers of type {kind!r} are not served" for kind in sorted(set(kinds) - set(known))]
    if reasons:
        raise Unsupported(f"farspan cannot patch {type(model).__name__}", reasons)
    return ModelInfo(decoder=decoder, config=config, attention=dict(sorted(attention.items())), kinds=kinds)


def _is_attention(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    try:
        return "attention_interface" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # no source at hand
        return type(module).__name__.endswith("Attention") and hasattr(module, "num_key_value_groups")


def _is_causal(module: nn.Module) -> bool:
    return getattr(module, "is_causal", True) is not False and "CrossAttention" not in type(module).__name__


# --- changing a model, reversibly ---------------------------------------------------------------------------


def install(
    model: nn.Module, info: ModelInfo, layers: dict[int, Layer], session: Session, chunk: int | None
) -> list[Callable[[], None]]:
    """Point every attention module at its Layer. Returns the undo steps, to be run last first."""
    _register()
    undo: list[Callable[[], None]] = []
    copies: dict[int, Any] = {}
    copy.deepcopy(info.config, copies)._attn_implementation_internal = NAME
    # Two models built from one config object share it: ours gets a copy, so that no other model is switched
    # over. Modules around a text backbone hold a config that contains its config, and make its masks by
    # that: copied along.
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and config.get_text_config(decoder=True) is info.config:
            module.config = copy.deepcopy(config, copies)
            undo.append(partial(setattr, module, "config", config))
    for index, module in info.attention.items():
        setattr(module, ATTRIBUTE, layers[index])
        undo.append(partial(delattr, module, ATTRIBUTE))
    if chunk is not None:
        undo.append(_chunk_forward(info.decoder, chunk))
    before = info.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: _begin(module, args, kwargs, session, set(layers)), with_kwargs=True
    )
    after = info.decoder.register_forward_hook(lambda *_: session.end(), always_call=True)
    undo += [before.remove, after.remove]
    return undo


def _begin(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], session: Session, patched: set[int]
) -> tuple[tuple[()], dict[str, Any]]:
    """Before the decoder runs: refuse what cannot be served, and put our storage under the call."""
    call = (
        dict(inspect.signature(type(decoder).forward).bind_partial(decoder, *args, **kwargs).arguments)
        if args
        else dict(kwargs)
    )
    if args:
        call.pop("self", None)
        for name in ("kwargs", "args"):
            call.update(call.pop(name, None) or {})
    if call.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise FarspanError(
            "farspan never makes attention weights, so output_attentions=True cannot be served: remove it."
        )
    use_cache = call.get("use_cache")
    if use_cache is None:
        use_cache = getattr(decoder.config, "use_cache", False)
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        use_cache = False  # the model itself switches the cache off then
    cache = call.get("past_key_values")
    if cache is None and use_cache:
        cache = call["past_key_values"] = DynamicCache(config=decoder.config)
    if cache is not None:
        adopt_cache(cache)
    _check_mask(call, cache)
    session.end()
    session.cached = cache is not None
    if cache is not None:
        session.stores = _Stores(cache)
    return (), call


class _Stores:
    """The stores of a cache by layer; layers of a bare cache appear as they are first used."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __getitem__(self, index: int) -> KVStore | None:
        layers = self.cache.layers
        layer = layers[index] if index < len(layers) else None
        return layer.store if isinstance(layer, KVStoreLayer) else None


def _check_mask(call: dict[str, Any], cache: Cache | None) -> None:
    mask = call.get("attention_mask")
    if isinstance(mask, dict) and FULL in mask:
        # The outer part of a multimodal model has asked our mask function already; its full mask is the
        # tokens' own.
        mask = call["attention_mask"] = mask[FULL]
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise FarspanError(
            f"farspan takes a 2-D attention mask (rows, positions) for left padding; got a {shape} one."
        )
    tokens = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if tokens is None:
        return
    past = 0 if cache is None else cache.get_seq_length()
    want = (tokens.shape[0], past + tokens.shape[1])
    if tuple(mask.shape) != want:
        raise FarspanError(
            f"The attention mask is {list(mask.shape)} where {list(want)} is needed: one entry for each of "
            f"{past} cached and "
            f"{tokens.shape[1]} new tokens in {tokens.shape[0]} rows."
        )


_ALONG_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "cache_position")


def _can_cut(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call can run in pieces: all its tensors are known to lie along the tokens, and so will its
    outputs."""
    flat = [x for value in kwargs.values() for x in (value if isinstance(value, list | tuple) else [value])]
    known = [kwargs.get(name) for name in (*_ALONG_TOKENS, "attention_mask")]
    foreign = any(isinstance(x, Tensor) and not any(x is y for y in known) for x in flat)
    routed = kwargs.get("output_router_logits", getattr(config, "output_router_logits", False))
    keyed = kwargs.get("return_dict", getattr(config, "return_dict", True))
    return not foreign and not routed and keyed is not False


def _chunk_forward(decoder: Any, chunk: int) -> Callable[[], None]:
    """Let a long call run as several of ``chunk`` tokens; the last takes a short rest along, so that it is no
    decode step."""
    original, replaced = decoder.forward, "forward" in vars(decoder)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tokens = (
            kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        )
        cache = kwargs.get("past_key_values")
        length = 0 if tokens is None else tokens.shape[1]
        if cache is None or length <= chunk + DECODE_ROWS or not _can_cut(decoder.config, kwargs):
            return original(*args, **kwargs)
        past = cache.get_seq_length()
        cuts = list(range(chunk, length, chunk))
        if length - cuts[-1] <= DECODE_ROWS:
            cuts.pop()
        outputs = []
        for a, b in zip([0, *cuts], [*cuts, length], strict=True):
            part = dict(kwargs)
            for name in _ALONG_TOKENS:
                if part.get(name) is not None:
                    part[name] = part[name][:, a:b] if name == "inputs_embeds" else part[name][..., a:b]
            if part.get("attention_mask") is not None:
                part["attention_mask"] = part["attention_mask"][:, : past + b]
            outputs.append(original(*args, **part))
        output = outputs[-1]
        output.last_hidden_state = torch.cat([part.last_hidden_state for part in outputs], 1)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(
                torch.cat(layer, 1) for layer in zip(*(part.hidden_states for part in outputs), strict=True)
            )
        return output

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    decoder.forward = forward

    def restore() -> None:
        if replaced:
            decoder.forward = original
        else:
            del decoder.forward

    return restore


def observe(
    module: nn.Module, before_rope: bool, see: Callable[[Tensor, Tensor], None]
) -> Callable[[], None]:
    """Call ``see(q, k)`` with what a patched attention module is given, uncached; with RoPE undone where
    asked.

    Rotation is undone by the module's own ``apply_rotary_pos_emb`` with the opposite angle, since hooks on
    projections miss fused ones and norms behind them; YaRN scales cos and sin, hence the division. Returns
    the undo step.
    """
    layer: Layer = getattr(module, ATTRIBUTE)
    given = inspect.signature(type(module).forward)
    rotate = getattr(inspect.getmodule(type(module)), "apply_rotary_pos_emb", None)
    angles: list[tuple[Tensor, Tensor] | None] = []
    if before_rope and rotate is None and "position_embeddings" in given.parameters:
        raise Unsupported(
            f"farspan cannot rank channels before RoPE in {type(module).__name__}",
            ["its module has no apply_rotary_pos_emb to undo; rank by 'qk', which is taken after RoPE"],
        )

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        angles[:] = [given.bind(module, *args, **kwargs).arguments.get("position_embeddings")]

    def observed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
        if before_rope and rotate is not None and angles[0] is not None:
            cos, sin = (x.float() for x in angles[0])
            size = cos**2 + sin**2
            see(*rotate(q.float(), k.float(), cos / size, -sin / size))
        else:
            see(q, k)
        return layer(q, k, v, mask, **how)

    hook = module.register_forward_pre_hook(remember, with_kwargs=True)
    setattr(module, ATTRIBUTE, observed)

    def undo() -> None:
        hook.remove()
        setattr(module, ATTRIBUTE, layer)

    return undo
