"""A decoder's forward call over ranks: its tokens are split by the layout, its hidden states are gathered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attention.attend import DECODE_ROWS
from ...attention.errors import FarspanError
from ...parallel.group.autograd import gather
from ...parallel.group.mesh import Mesh
from ...parallel.mechanisms.call import Call
from ...parallel.mechanisms.gather import gather_rows
from ...parallel.mechanisms.layout import Layout, Split
from ...parallel.mechanisms.prefill import make_split
from ..padding import Padding, read_padding
from ..session import Session
from ..store.shard import running
from .cache import ShardStoreLayer
from .decoder_call import tokens_of
from .hooks import replace_forward
from .models import ModelInfo
from .releases import given_cache


def split_forward(
    info: ModelInfo, session: Session, block_multiple: int, in_order: bool
) -> Callable[[], None]:
    """Make the decoder split long calls over ``session.mesh``, at multiples of ``block_multiple`` tokens.
    Short calls run whole on every rank. in_order: some layer has a recurrent state, so the tokens of a rank
    are contiguous. Returns the undo step."""
    return replace_forward(info.decoder, partial(_forward, info, session, block_multiple, in_order))


ALONG_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "cache_position")


def along_tokens(name: str, x: Tensor, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``change(x, dim)``, where dim is the token dimension of the argument ``name``."""
    return change(x, 1 if name == "inputs_embeds" else x.dim() - 1)


def foreign_tensors(config: Any, kwargs: dict[str, Any]) -> list[str]:
    """The arguments and outputs of a call whose token dimension is not known. If there is one, the call
    cannot be cut along its tokens."""
    known = [kwargs.get(name) for name in (*ALONG_TOKENS, "attention_mask")]
    found = [
        name
        for name, value in kwargs.items()
        if any(not any(x is y for y in known) for x in tensors_in(value))
    ]
    if kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        found.append("output_router_logits")
    if kwargs.get("return_dict", getattr(config, "return_dict", True)) is False:
        found.append("return_dict=False")
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the value if it is a tensor, and every tensor at any depth of mappings, sequences, sets and
    dataclasses, such as the outputs of models. Caches and other objects are not searched."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, list | tuple | Set):
        for part in value:
            yield from tensors_in(part)


@contextmanager
def stopping_all_ranks(mesh: Mesh | None) -> Iterator[None]:
    """A context for code that may fail on this rank only. An error in it stops the other ranks, which raise
    the same sentence."""
    try:
        yield
    except BaseException as error:
        named = error if mesh is None else mesh.watch.failing(error)
        if named is error:
            raise
        raise named from error


def _forward(
    info: ModelInfo,
    session: Session,
    block_multiple: int,
    in_order: bool,
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The forward of the decoder. The pre-hook has made every argument a keyword argument."""
    assert session.mesh is not None and not args
    if tokens_of(kwargs) is None:
        return original(**kwargs)
    with stopping_all_ranks(session.mesh):
        call, positions = _split_arguments(info, session, session.mesh, block_multiple, in_order, kwargs)
        session.call, before = call, running.set(call)
        try:
            with session.part_of(positions):
                output = original(**kwargs)
        finally:
            session.call = None
            running.reset(before)
        if call.split is not None:
            split, mesh = call.split, session.mesh
            output.last_hidden_state = _collect(output.last_hidden_state, split, mesh, session.logits_to_keep)
            if output.get("hidden_states") is not None:
                output.hidden_states = tuple(_collect(x, split, mesh, None) for x in output.hidden_states)
    session.output = output.last_hidden_state[:, -1].detach()
    return output


def _split_arguments(
    info: ModelInfo,
    session: Session,
    mesh: Mesh,
    block_multiple: int,
    in_order: bool,
    kwargs: dict[str, Any],
) -> tuple[Call, Tensor]:
    """Check that all ranks have the same arguments, and reduce ``kwargs`` to the tokens of this rank. Returns
    the call, and the positions of all its tokens."""
    tokens = tokens_of(kwargs)
    assert tokens is not None
    cache, mask = given_cache(kwargs), kwargs.get("attention_mask")
    past = cache.get_seq_length() if cache is not None else 0
    total = past + tokens.shape[1]
    padding = Padding() if mask is None else read_padding(mask)
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = torch.arange(past, total, device=tokens.device)[None]
    positions: Tensor = kwargs["position_ids"]
    if mesh.config.check:
        mesh.agree(
            {
                "the shape of the input": str((tuple(tokens.shape), past)),
                "the input": tokens.detach(),
                "the positions": positions,
                "the padding": str((padding.starts, padding.ends)),
                "the last output": session.output,
            }
        )
    split, memory = None, None
    if tokens.shape[1] > DECODE_ROWS:
        if foreign := foreign_tensors(info.config, kwargs):
            raise FarspanError(
                f"This call of {type(info.decoder).__name__} cannot be split over ranks, because "
                f"{', '.join(foreign)} may not lie along the tokens: leave them out of the call."
            )
        split, memory = (
            make_split(mesh, past, total, block_multiple, _cache_layout(cache), in_order),
            _spare_memory(mesh),
        )
        at = split.take(mesh.ranks.rank, tokens.device)
        for name in ALONG_TOKENS:
            if kwargs.get(name) is not None:
                kwargs[name] = along_tokens(name, kwargs[name], lambda x, dim: x.index_select(dim, at))
    call = Call(split, past, total, padding.start, padding.starts, memory)
    if mask is None:  # with a mask, transformers does not search this rank's positions for packed sequences
        kwargs["attention_mask"] = torch.ones(tokens.shape[0], total, dtype=torch.bool, device=tokens.device)
    return call, positions


def _cache_layout(cache: Any) -> Layout | None:
    """The layout of a cache that is sharded already; None for any other cache."""
    stores = [layer.store for layer in getattr(cache, "layers", ()) if isinstance(layer, ShardStoreLayer)]
    whole = [store for store in stores if store.needed is None]
    return (whole or stores)[0].layout if stores else None


def _spare_memory(mesh: Mesh) -> int | None:
    """Half of the smallest free GPU memory of any rank, in bytes; None on a CPU. It is the same number on
    every rank, rounded down to whole GiB, so that a choice by it does not change between calls."""
    if mesh.device.type != "cuda":
        return None
    free = torch.tensor([torch.cuda.mem_get_info(mesh.device)[0]], device=mesh.device)
    return int(mesh.ranks.all_gather(free, "agree").min()) // 2 >> 30 << 30


def _collect(x: Tensor, split: Split, mesh: Mesh, positions: int | None) -> Tensor:
    """Gather x [B, split.rows, hidden] of all ranks. Returns the last ``positions`` positions of the call
    (None: all of them) on every rank."""
    if positions is None or positions >= split.end - split.begin:
        return split.joined(gather(x, mesh.ranks, "hidden"), 1)
    layout = split.layout()
    first = layout.below(mesh.ranks.rank, split.end - positions)
    return gather_rows(
        split.real(x, mesh.ranks.rank, 1)[:, first:],
        layout.cut(split.end - positions, split.end),
        mesh.ranks,
        "hidden",
    )
