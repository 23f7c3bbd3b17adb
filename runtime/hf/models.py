"""Inspect a model: its decoder and attention modules, or every reason why farspan cannot serve it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from ...attention.errors import FarspanError, Unsupported
from ...attention.hybrid.mixer import Mixer
from ...attention.method import LayerInfo
from ...parallel.group.config import ContextParallel
from ...parallel.group.join import join
from ...parallel.group.mesh import Mesh
from .interface import ATTRIBUTE
from .recurrent_over_ranks import passes_states
from .tensor import TENSOR, count_heads, same_heads, weights_mesh
from .transformers_private import calls_attention_interface, layer_types

FULL, SLIDING, LINEAR, HYBRID = "full_attention", "sliding_attention", "linear_attention", "hybrid"
MIXERS = "farspan_mixers"  # the entry of a converted model's config that lists the mixers of its layers
STATELESS = (FULL, SLIDING, "dummy", "mlp", "moe")  # types of layers without a recurrent state
_WITHOUT_ATTENTION = (LINEAR, "conv", "mamba", "dummy", "mlp", "moe")


@dataclass
class ModelInfo:
    """The parts of a model that patching uses: its decoder, and its attention modules by layer.

    kinds: the type of each layer, such as "full_attention".
    """

    model: nn.Module
    decoder: nn.Module
    config: Any
    attention: dict[int, nn.Module]
    kinds: list[str]

    @property
    def geometry(self) -> dict[str, Any]:
        """The architecture, sizes and fingerprint of the whole model, which a recipe must match."""
        first = self._whole(min(self.attention))
        sizes = {
            "model_type": self.config.model_type,
            "num_layers": len(self.kinds),
            "hidden_size": self.config.hidden_size,
            "vocab_size": self.config.vocab_size,
            "num_heads": first.num_heads,
            "num_kv_heads": first.num_kv_heads,
            "head_dim": first.head_dim,
        }
        return sizes if self._fingerprint is None else {**sizes, "fingerprint": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> dict[str, list[float]] | None:
        """Numbers that tell models of the same sizes apart, and hardly change by fine-tuning, in another
        dtype or by quantisation: mean magnitudes of the weights of three norms, and the means of 16 channels
        of the embedding over 512 tokens. None where the weights are not here."""
        norms = [p for name, p in self.decoder.named_parameters() if p.dim() == 1 and "norm" in name]
        chosen = [norms[0], norms[len(norms) // 2], norms[-1]] if norms else []
        embedding: Any = getattr(cast(Any, self.model).get_input_embeddings(), "weight", None)
        parts = [*chosen, embedding]
        if not chosen or any(p is None or p.is_meta or type(p.data) is not torch.Tensor for p in parts):
            return None
        means = embedding.detach()[:512, :16].float().mean(0).tolist()
        magnitudes = [p.detach().float().abs().mean().item() for p in chosen]
        return {"norms": [_short(x) for x in magnitudes], "embedding": [_short(x) for x in means]}

    def layer_info(self, index: int) -> LayerInfo:
        """Number of heads and head size of one layer; under tensor parallelism, of the heads on this rank."""
        whole = self._whole(index)
        if self.weights_mesh is None or self._heads[index] == (whole.num_heads, whole.num_kv_heads):
            return whole
        heads, kv_heads = self._heads[index]
        size = self.weights_mesh[TENSOR].size()
        if (heads * size, kv_heads * size) != (whole.num_heads, whole.num_kv_heads):
            raise self._uneven(size)
        place = self.weights_mesh[TENSOR].get_local_rank()
        return dataclasses.replace(whole, num_heads=heads, num_kv_heads=kv_heads, tp_size=size, tp_rank=place)

    def _whole(self, index: int) -> LayerInfo:
        settings = layer_configs(self.config)
        config = settings[index] if len(settings) > 1 else settings[0]
        heads = config.num_attention_heads
        group = int(getattr(self.attention[index], "num_key_value_groups", 1))
        head_dim = getattr(self.attention[index], "head_dim", None) or config.hidden_size // heads
        return LayerInfo(
            index=index,
            num_heads=heads,
            num_kv_heads=heads // group,
            head_dim=int(head_dim),
            hidden_size=int(self.config.hidden_size),
            num_layers=len(self.kinds),
        )

    @cached_property
    def weights_mesh(self) -> DeviceMesh | None:
        """The device mesh over which tensor parallelism shards the weights; None without it."""
        return weights_mesh(self.model)

    @cached_property
    def _heads(self) -> dict[int, tuple[int, int]]:
        try:
            return count_heads(self.model, self.config, self.attention)
        except RuntimeError as error:
            assert self.weights_mesh is not None
            size = self.weights_mesh[TENSOR].size()
            if all(self._whole(i).num_kv_heads % size == 0 for i in self.attention):
                raise
            raise self._uneven(size) from error

    def _uneven(self, size: int) -> Unsupported:
        whole = self._whole(min(self.attention))
        return Unsupported(
            f"farspan cannot patch {type(self.model).__name__}",
            [
                f"its {whole.num_heads} query heads and {whole.num_kv_heads} KV heads do not divide by the "
                f"{size} ranks of tensor parallelism"
            ],
        )


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def is_patched(model: nn.Module) -> bool:
    """Whether some layer of the model is patched."""
    return any(ATTRIBUTE in vars(m) for m in model.modules())


def inspect_model(model: Any) -> ModelInfo:
    """Find the parts of a model that patching uses. Raises Unsupported, with every reason, for a model that
    farspan cannot serve."""
    if not isinstance(model, nn.Module) or not hasattr(model, "get_decoder"):
        raise Unsupported(
            f"farspan cannot patch a {type(model).__name__}",
            [f"it patches transformers' causal LMs (a PreTrainedModel){_inside(model)}"],
        )
    decoder = without_head(cast(Any, model).get_decoder())
    config = getattr(decoder, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise Unsupported(
            f"farspan cannot patch {type(model).__name__}",
            [f"its get_decoder() returns a {type(decoder).__name__} without a transformers config"],
        )
    settings = layer_configs(config)

    def is_set(name: str) -> bool:
        return any(_is_set(getattr(one, name, None)) for one in settings)

    reasons = []
    if is_set("is_encoder_decoder"):
        reasons.append("encoder-decoder models are not causal LMs")
    if is_set("kv_lora_rank"):
        reasons.append("latent attention (MLA) does not attend to the keys and values of a cache")
    if is_set("num_kv_shared_layers") or any(_reuses_keys(one) for one in settings):
        reasons.append("layers that use another layer's keys are not served")
    if any(getattr(getattr(m, "config", None), "output_attentions", False) for m in (model, decoder)):
        reasons.append("its config sets output_attentions, and farspan never computes attention weights")
    if not all(_is_causal_config(one) for one in settings):
        reasons.append("its attention is bidirectional")
    modules = [m for m in decoder.modules() if _is_attention(m)]
    attention = {m.layer_idx: m for m in modules}
    if not attention:
        reasons.append("none of its modules calls attention through transformers' AttentionInterface")
    if not all(map(_is_causal, modules)):
        reasons.append("some of its attention is not causal (an encoder or cross-attention)")
    elif len(attention) < len(modules):
        reasons.append("some of its layers have more than one attention module")
    kinds: list[str] = []
    if not reasons:
        kinds = layer_types(config.get_text_config(decoder=True))[0]
        specs = getattr(config, MIXERS, None) or [None] * len(kinds)
        kinds = [LINEAR if spec else kind for kind, spec in zip(kinds, specs, strict=True)]
        known = (FULL, SLIDING, HYBRID, *_WITHOUT_ATTENTION)
        reasons += [f"layers of type {kind!r} are not served" for kind in sorted(set(kinds) - set(known))]
    if reasons:
        raise Unsupported(f"farspan cannot patch {type(model).__name__}", reasons)
    return ModelInfo(model, decoder, config, dict(sorted(attention.items())), kinds)


def without_head(decoder: Any) -> Any:
    """The part of a decoder that returns hidden states. For the text models of Mllama and Kosmos-2.5,
    `get_decoder` returns a CausalLM with a head."""
    if isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        inner = [part for part in decoder.children() if isinstance(part, PreTrainedModel)]
        if len(inner) == 1:
            return inner[0]
    return decoder


def place_beside(module: nn.Module, other: nn.Module) -> None:
    """Move ``module`` to the device of the weights of ``other``, if they are all on one device. The dtypes
    do not change."""
    devices = {p.device for p in other.parameters() if p.device.type != "meta"}
    if len(devices) == 1:
        module.to(devices.pop())


def _inside(wrapper: Any) -> str:
    """A hint where the model is inside a wrapper of DistributedDataParallel, DeepSpeed or others; else ""."""
    inner = getattr(wrapper, "module", None)
    if not isinstance(inner, nn.Module) or not hasattr(inner, "get_decoder"):
        return ""
    return f"; pass the {type(inner).__name__} in it: its .module, or accelerator.unwrap_model(...)"


def layer_configs(config: Any) -> list[Any]:
    """The config alone; or one config for each layer where settings differ between layers, since such a
    config does not return these settings itself."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def _reuses_keys(config: Any) -> bool:
    """Whether some layer reuses the keys of another layer. The mode of the other layer is "store", also where
    no layer reuses its keys (Gemma 4 in transformers 5.24)."""
    modes = getattr(config, "kv_sharing_modes", None) or ()
    return any(str(mode).startswith("reuse") for mode in modes)


def _is_set(value: Any) -> bool:
    """Whether a setting is true; for a list, whether one of its entries is."""
    return any(map(_is_set, value)) if isinstance(value, list | tuple) else bool(value)


def _is_causal_config(config: Any) -> bool:
    """Whether attention between text tokens is causal. With "vision", only image tokens attend to later
    tokens, and the mask function refuses calls with images."""
    both_ways = getattr(config, "use_bidirectional_attention", None)
    return bool(getattr(config, "is_causal", True)) and both_ways in (None, False, "vision")


def _is_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and calls_attention(module)


def calls_attention(module: nn.Module) -> bool:
    """Whether a module calls attention through transformers' AttentionInterface."""
    calls = calls_attention_interface(type(module).forward)
    if calls is None:  # the source of the class is not available
        return type(module).__name__.endswith("Attention") and hasattr(module, "num_key_value_groups")
    return calls


def _is_causal(module: nn.Module) -> bool:
    return getattr(module, "is_causal", True) is not False and "CrossAttention" not in type(module).__name__


def join_ranks(model: nn.Module, info: ModelInfo, parallel: Any, mixers: Mapping[int, Mixer]) -> Mesh | None:
    """The mesh of ranks for ``parallel``; None in one process. mixers: those in place
    of attention, by layer. Raises Unsupported for a model whose sequence
    cannot be sharded."""
    served = {m.layer_idx for m in info.decoder.modules() if passes_states(m)} | mixers.keys()
    stateful = {k for i, k in enumerate(info.kinds) if k not in STATELESS and i not in served}
    reasons = [
        f"layers of type {kind!r} have a recurrent state that farspan does not know how to pass between ranks"
        for kind in sorted(stateful)
    ]
    reasons += [
        f"the mixer {name} does not define what a shard of a sequence does to its state (its halo is None)"
        for name in sorted({mixer.name for mixer in mixers.values() if mixer.halo is None})
    ]
    if "position_ids" not in inspect.signature(info.decoder.forward).parameters:
        reasons.append("its decoder takes no position_ids, so it cannot compute a part of the sequence")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        reasons.append("device_map has put its layers on several devices; give each rank one device")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        reasons.append(
            "its weights are sharded by DeepSpeed ZeRO-3, which gathers them on a schedule that farspan does "
            "not control; use ZeRO-2 or less, torch's FSDP2 (fully_shard), or transformers' tensor "
            "parallelism on a (cp, tp) mesh"
        )
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    if device is None:
        reasons.append("its weights are offloaded; load them onto one device of each rank")
    if reasons or device is None:
        raise Unsupported(f"farspan cannot run {type(model).__name__} over ranks", reasons)
    if info.weights_mesh is None:
        return join(parallel, device)
    return _join_beside(info.weights_mesh, parallel, device)


def _join_beside(weights: DeviceMesh, parallel: Any, device: torch.device) -> Mesh | None:
    """See ``join``; for a model under tensor parallelism. Ranks that have different heads never share a
    sequence."""
    config = ContextParallel() if parallel == "auto" else parallel
    if isinstance(config, ContextParallel) and config.mesh is None:
        along = same_heads(weights)
        if along is None:
            if config.size not in (None, 1):
                raise FarspanError(
                    f"ContextParallel(size={config.size}) was given, but tensor parallelism uses all "
                    f"{weights.size()} ranks of the job: start {config.size} times as many processes."
                )
            return None
        config = dataclasses.replace(config, mesh=along)
    mesh = join(config, device)
    if mesh is None:
        return None
    peers = set(weights[TENSOR].mesh.flatten().tolist())
    if len(peers.intersection(map(mesh.ranks.global_rank, range(mesh.size)))) > 1:
        mesh.close()
        raise FarspanError(
            "parallel= shards a sequence over ranks that have different heads of the model under tensor "
            'parallelism: take the ranks along the dimension "cp" of a ("cp", "tp") mesh.'
        )
    return mesh
