"""Changing a model, reversibly: configs, attention modules and hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ...attention.attend import DECODE_ROWS
from ...attention.errors import FarspanError
from ..cache import KVStore
from ..chunking import Chunking
from ..layer import Layer
from ..mixers import Mixed
from ..padding import Padding, ends_by_positions, read_padding, refuse_right_padding
from ..session import Session
from ..shard import ShardStore
from .cache import KVStoreLayer, adopt_cache
from .chunked_prefill import chunk_forward
from .config_copies import copy_configs
from .decoder_over_ranks import spread_forward, stopping_all_ranks
from .hooks import Hook
from .inputs import feed_inputs
from .interface import ATTRIBUTE, NAME, check_positions, register
from .logits_to_keep import watch_logits
from .mixers import adopt_states, put_mixers
from .models import FULL, ModelInfo, calls_attention
from .releases import CACHE_NAMES, cache_name, given_cache
from .rope import follow_length
from .transformers_private import attention_of


def install(
    model: nn.Module,
    info: ModelInfo,
    layers: dict[int, Layer],
    session: Session,
    chunk: Chunking | None,
    block_multiple: int = 1,
    mixed: Mapping[int, Mixed] | None = None,
) -> list[Callable[[], None]]:
    """Point every attention module at its Layer. Returns the undo steps, to be run last first.

    chunk: how prefill calls are cut, or None; block_multiple: tokens in multiples of which a step is shared
    out over the ranks of ``session.mesh``. mixed: mixers, by the layer whose attention they replace; those
    layers are not in ``layers``.
    """
    register()
    mixed = mixed or {}
    served = {module for i, module in info.attention.items() if i in layers}
    fed = [(info.attention[i], layer.needs) for i, layer in layers.items() if layer.needs.inputs]
    undo = feed_inputs(info.decoder, fed, session)
    undo += put_mixers(info, mixed, session)
    undo.append(copy_configs(model, info.config, leave=lambda m: m not in served and calls_attention(m)))
    for index, layer in layers.items():
        setattr(info.attention[index], ATTRIBUTE, layer)
        undo.append(partial(delattr, info.attention[index], ATTRIBUTE))
    if session.mesh is not None or chunk is not None:
        undo += follow_length(info.decoder, session)
    undo += watch_logits(model, info.decoder, session)
    if session.mesh is not None:
        undo.append(spread_forward(info, session, block_multiple))
    if chunk is not None:
        undo.append(chunk_forward(info.decoder, chunk, session))

    ahead = sorted({str(x.prefill) for x in layers.values() if x.prefill.lookahead.tokens})

    def begin_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with stopping_all_ranks(session.mesh):
            return (
                None
                if _switched_off(module, session)
                else _before_decoder(module, args, kwargs, session, ahead, mixed, len(info.kinds))
            )

    before = info.decoder.register_forward_pre_hook(Hook(begin_call), with_kwargs=True)
    after = info.decoder.register_forward_hook(Hook(lambda *_: session.end_call()), always_call=True)
    undo += [before.remove, after.remove]
    return undo


def _switched_off(decoder: Any, session: Session) -> bool:
    """Whether the model has been set to another attention since the patch; its calls are its own then."""
    name = attention_of(decoder.config)
    session.off = name != NAME
    if not session.off:
        return False
    sentence = (
        f"The patched model was set to the attention {name!r} (model.set_attn_implementation), so farspan "
        f"does nothing in it: call remove(), which keeps {name!r}, and patch again to have farspan back."
    )
    if session.strict or session.mesh is not None:
        raise FarspanError(sentence)
    session.notice(f"the model was set to the attention {name!r}, so farspan did nothing", sentence)
    return True


def _before_decoder(
    decoder: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    session: Session,
    ahead: list[str],
    mixed: Mapping[int, Mixed],
    count: int,
) -> tuple[tuple[()], dict[str, Any]]:
    """Before the decoder runs: refuse what cannot be served, and put our storage under the call. ahead: the
    methods whose selection looks ahead. mixed: the mixers, whose states the cache holds; count:
    layers of the model."""
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
    cache = given_cache(call)
    for name in CACHE_NAMES:  # one name from here on: where both are given, transformers drops the older one
        call.pop(name, None)
    if cache is None and use_cache:
        cache = DynamicCache(config=decoder.config)
    if cache is not None:
        call[cache_name(decoder)] = cache
    mesh = session.mesh
    if cache is not None:
        adopt_cache(cache, None if mesh is None else partial(ShardStore, mesh.ranks, mesh.config.block))
        adopt_states(cache, mixed, count)
    past = 0 if cache is None else cache.get_seq_length()
    tokens = _tokens(call)
    mask = _checked_mask(call, tokens, past)
    if mask is None and cache is None:
        check_positions(call.get("position_ids"))
    padding = _padding(mask, call, past, session, ahead)
    total = past + (0 if tokens is None else tokens.shape[1])
    session.begin_call(None if cache is None else _Stores(cache), padding, total)
    return (), call


def _tokens(call: dict[str, Any]) -> Tensor | None:
    return call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")


class _Stores:
    """The stores of a cache by layer; layers of a bare cache appear as they are first used."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __getitem__(self, index: int) -> KVStore | None:
        layers = self.cache.layers
        layer = layers[index] if index < len(layers) else None
        return layer.store if isinstance(layer, KVStoreLayer) else None


def _checked_mask(call: dict[str, Any], tokens: Tensor | None, past: int) -> Tensor | None:
    """The mask of a call, a 2-D one that covers its tokens and the ``past`` ones; None without one."""
    mask = call.get("attention_mask")
    if isinstance(mask, dict) and FULL in mask:
        # The outer part of a multimodal model has asked our mask function already; its full mask is the
        # tokens' own.
        mask = call["attention_mask"] = mask[FULL]
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise FarspanError(
            f"farspan takes a 2-D attention mask (rows, positions) for padding; got a {shape} one."
        )
    if tokens is None:
        return mask
    want = (tokens.shape[0], past + tokens.shape[1])
    if tuple(mask.shape) != want:
        raise FarspanError(
            f"The attention mask is {list(mask.shape)} where {list(want)} is needed: one entry for each of "
            f"{past} cached and "
            f"{tokens.shape[1]} new tokens in {tokens.shape[0]} rows."
        )
    return mask


def _padding(
    mask: Tensor | None, call: dict[str, Any], past: int, session: Session, ahead: list[str]
) -> Padding:
    """Where the rows of a call begin and end. Padding on the right is refused where the caller goes on from
    the last position of every row."""
    tokens = _tokens(call)
    rows, length = (0, 0) if tokens is None else tokens.shape[:2]
    positions = call.get("position_ids")
    if mask is not None:
        padding, evidence = read_padding(mask), "The attention mask has zeros after ones"
    elif ahead and length > DECODE_ROWS and positions is not None and positions.dim() == 2:
        ends = ends_by_positions(positions.expand(rows, -1), past)
        if (
            ends is not None
            and session.logits_to_keep is not None
            and min(ends) <= past + length - session.logits_to_keep
        ):
            ends = None
        padding, evidence = Padding(ends=ends), "The positions stand still"
    else:
        return Padding()
    if padding.ends is None:
        return padding
    if past and length <= DECODE_ROWS:
        why = f"a call of at most {DECODE_ROWS} tokens on a filled cache goes on from the last of each row"
    elif session.logits_to_keep is not None and min(padding.ends) <= past + length - session.logits_to_keep:
        why = "the logits asked for are those of the padding"
    elif session.mesh is not None and ahead:
        why = f"over ranks the padding would have a part in what {' and '.join(ahead)} selects"
    else:
        return padding
    raise refuse_right_padding(padding.ends, evidence, why)
