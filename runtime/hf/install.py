"""Change a model reversibly: its configs, attention modules and hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...attention.attend import DECODE_ROWS
from ...attention.errors import FarspanError
from ..chunking import Chunking
from ..layer import Layer
from ..mixers import Mixed
from ..padding import Padding, checked_2d, ends_by_positions, read_padding, refuse_right_padding
from ..session import Session
from ..static_call import StaticCall
from ..store.static import check_room
from ..store.storage import Storage
from ..store.store import KVStore
from .cache import CachePlan, KVStoreLayer
from .caches import PatchedCaches
from .captured import arguments_of_step, run_steps
from .chunked_prefill import chunk_forward
from .config_copies import copy_configs
from .decoder_call import arguments, settle_cache, tokens_of
from .decoder_over_ranks import split_forward, stopping_all_ranks
from .hooks import Hook
from .inputs import feed_inputs
from .interface import ATTRIBUTE, NAME, check_positions, register
from .logits_to_keep import watch_logits
from .mixers import check_rope, put_mixers
from .mixers_in_place import pass_states_in_place
from .models import FULL, ModelInfo, calls_attention
from .recurrent import mask_padding
from .recurrent_over_ranks import pass_states
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
    continues: Callable[[], bool] = lambda: True,
    static: int | None = None,
    storages: Mapping[int, Storage] | None = None,
    about: Mapping[str, str] | None = None,
) -> list[Callable[[], None]]:
    """Set the Layer of every attention module. Returns the undo steps, which must run from the last to the
    first.

    chunk: how prefill calls are cut into chunks; None: they are not cut.
    block_multiple: over ranks, the tokens of a call are split at multiples of this number.
    mixed: the mixers by the layer whose attention they replace. These layers are not in ``layers``.
    continues: whether layers without attention continue exactly in a call of several tokens on a cache.
    static: the number of positions for which caches of fixed size are made; None: caches grow.
    storages: how the caches of layers keep keys and values; those of other layers keep plain numbers on the
    device.
    about: the ``spec`` and ``adapters`` of ``PatchedCaches``.
    """
    register()
    mixed = mixed or {}
    check_rope(info, mixed)
    served = {module for i, module in info.attention.items() if i in layers}
    fed = {i: layer.needs for i, layer in layers.items() if layer.needs.inputs}
    undo = feed_inputs(info, fed, session)
    undo += put_mixers(info, mixed, session)
    undo.append(copy_configs(model, info.config, leave=lambda m: m not in served and calls_attention(m)))
    for index, layer in layers.items():
        setattr(info.attention[index], ATTRIBUTE, layer)
        undo.append(partial(delattr, info.attention[index], ATTRIBUTE))
    if session.mesh is not None or chunk is not None:
        undo += follow_length(info.decoder, session)
    undo += watch_logits(model, info.decoder, session)
    undo += mask_padding(info, session, continues)
    if session.mesh is not None:
        passing = pass_states(info.decoder, session) + pass_states_in_place(info.decoder, session)
        undo += passing
        undo.append(split_forward(info, session, block_multiple, in_order=bool(mixed or passing)))
    if chunk is not None:
        undo.append(chunk_forward(info.decoder, chunk, session))
    if static is not None:
        undo.append(run_steps(info.decoder, session))

    mesh = session.mesh
    ranks, block = (None, 0) if mesh is None else (mesh.ranks, mesh.config.block)
    plan = CachePlan(count=len(info.kinds), storages=storages or {}, ranks=ranks, block=block, room=static)
    caches = PatchedCaches(info, plan, layers, mixed, **about or {})
    undo.append(caches.put())
    ahead = sorted({str(x.prefill) for x in layers.values() if x.prefill.lookahead.tokens})

    def pre_hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with stopping_all_ranks(session.mesh):
            return (
                None
                if _switched_off(module, session)
                else _before_decoder(module, args, kwargs, session, ahead, caches)
            )

    before = info.decoder.register_forward_pre_hook(Hook(pre_hook), with_kwargs=True)
    after = info.decoder.register_forward_hook(Hook(lambda *_: session.end_call()), always_call=True)
    undo += [before.remove, after.remove]
    return undo


def _switched_off(decoder: Any, session: Session) -> bool:
    """Whether the caller has set the model to another attention since the patch; then farspan does
    nothing."""
    name = attention_of(decoder.config)
    session.off = name != NAME
    if not session.off:
        return False
    sentence = (
        f"The patched model was set to the attention {name!r} (model.set_attn_implementation), so farspan "
        f"does nothing: call remove(), which keeps {name!r}, and patch again to use farspan."
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
    caches: PatchedCaches,
) -> tuple[tuple[()], dict[str, Any]]:
    """The pre-hook of the decoder. It refuses calls that cannot be served, gives the cache farspan's storage,
    and begins the call in the session. Returns the new arguments.

    ahead: the methods with a lookahead. caches: how the cache is made; a step on stores of fixed size serves
    its layers.
    """
    plan, layers = caches.plan, caches.layers
    call = arguments(decoder, args, kwargs)
    if call.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise FarspanError(
            "output_attentions=True was given, and farspan never computes attention weights: leave it out."
        )
    cache = settle_cache(decoder, call)
    if cache is not None:
        caches.adopt(cache)
    past = 0 if cache is None else cache.get_seq_length()
    tokens = tokens_of(call)
    mask = _checked_mask(call, tokens, past)
    if mask is None and cache is None:
        check_positions(call.get("position_ids"))
    total = past + (0 if tokens is None else tokens.shape[1])
    stores = None if cache is None else _Stores(cache)
    if plan.room is not None and stores is not None and tokens is not None:
        check_room(total, plan.room)
        masked = mask is not None and call.get("position_ids") is not None
        step = StaticCall.of(layers, stores.__getitem__, tokens, masked)
        if step is not None:
            session.begin_call(stores, Padding(), total)
            session.step = step
            return (), arguments_of_step(call, past, tokens.device)
        for layer in layers.values():
            layer.settle()  # the steps before this call
    padding = _padding(mask, call, past, session, ahead)
    session.begin_call(stores, padding, total)
    return (), call


class _Stores:
    """The stores of a cache by layer; a layer that the cache does not have has none."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __getitem__(self, index: int) -> KVStore | None:
        layers = self.cache.layers
        layer = layers[index] if index < len(layers) else None
        return layer.store if isinstance(layer, KVStoreLayer) else None


def _checked_mask(call: dict[str, Any], tokens: Tensor | None, past: int) -> Tensor | None:
    """The mask of a call; None without one. Raises FarspanError unless it is 2-D and covers the tokens of the
    call and the ``past`` tokens before it."""
    mask = call.get("attention_mask")
    if isinstance(mask, dict) and FULL in mask:
        # The outer model of a multimodal model has called our mask function already. Its mask for full
        # attention is the padding mask.
        mask = call["attention_mask"] = mask[FULL]
    if mask is None:
        return None
    mask = checked_2d(mask)
    if tokens is None:
        return mask
    want = (tokens.shape[0], past + tokens.shape[1])
    if tuple(mask.shape) != want:
        raise FarspanError(
            f"The shape of the attention mask is {list(mask.shape)} where {list(want)} is needed: pass one "
            f"entry for each of {past} cached and {tokens.shape[1]} new tokens in {tokens.shape[0]} rows."
        )
    return mask


def _padding(
    mask: Tensor | None, call: dict[str, Any], past: int, session: Session, ahead: list[str]
) -> Padding:
    """The positions at which the rows of a call begin and end. Raises FarspanError for padding on the right
    where the caller uses the last position of every row."""
    tokens = tokens_of(call)
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
        why = f"a call of at most {DECODE_ROWS} tokens on a cache continues the last position of each row"
    elif session.logits_to_keep is not None and min(padding.ends) <= past + length - session.logits_to_keep:
        why = "the returned logits would be those of the padding"
    elif session.mesh is not None and ahead:
        why = f"over ranks the padding would change what {' and '.join(ahead)} selects"
    else:
        return padding
    raise refuse_right_padding(padding.ends, evidence, why)
