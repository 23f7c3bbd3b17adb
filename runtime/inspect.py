"""One prompt's prefill, looked at: what a method read of the true attention, layer by layer and block by
block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.checks import whole_number
from ..attention.errors import FarspanError, SpecError
from ..attention.keys import Keys
from ..attention.mass import block_reads, visible_pairs
from ..attention.method import AttentionMethod
from ..attention.ops.block_max import block_max
from ..attention.ops.flash import flash
from ..attention.selection import Selection
from . import hf
from .measure import ROWS
from .patch import patch, resolve
from .recipe import Recipe
from .report import Report

LAYERS, HEADS = 4, 6  # that are drawn where none are named
BLOCK = 64  # tokens; a shorter prompt is one block
BLOCKS = 4096  # of a picture's side, at most


@dataclass(frozen=True, kw_only=True)
class LayerPicture:
    """What some query heads of one layer attended to and read, in blocks of ``block`` queries and keys.

    attention [heads, N, N] float32: the largest causal attention probability of each block (``block_max``).
    read [heads, N, N] float32: the share of the block's visible (query, key) pairs that was read, by the
    keys' own positions, whatever order the method has put them in. Both are 0 where nothing is visible.
    density, recall: of each head, the share of visible pairs read, and of the true attention (sampled rows).
    """

    layer: int
    heads: list[int]
    block: int
    length: int
    attention: Tensor
    read: Tensor
    density: list[float]
    recall: list[float]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A prefill of ``length`` tokens by ``method``: the report of all layers, measured, and the pictures of
    some."""

    method: str
    length: int
    report: Report
    pictures: list[LayerPicture]


def inspect(
    model: Any,
    inputs: Tensor | Mapping[str, Tensor],
    spec: str | AttentionMethod,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    block: int = BLOCK,
    rows: int = ROWS,
    recipe: Recipe | str | Path | None = None,
) -> Inspection:
    """Run one prompt's prefill under the prefill method of ``spec`` and look at what it read.

    inputs: token ids [1, T], or a mapping with ``input_ids``. layers, heads (query heads): which to make
    pictures of, in blocks of ``block`` tokens; where none are named, up to 4 layers and 6 heads, evenly
    spread. rows: queries per layer on which the recall of attention mass is measured, evenly spread. Nothing
    of size T x T is made; the pictures' true attention costs as much as dense attention of their heads.

    Raises SpecError for a spec without a prefill, FarspanError for layers, heads and blocks that there are
    not and for a batch, and what ``patch`` raises.
    """
    ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise FarspanError(f"inspect takes the ids of one prompt, [1, T]; got {list(ids.shape)}.")
    length = ids.shape[1]
    size = whole_number(block)
    if size is None or not 1 <= size <= max(length, BLOCK) or -(-length // size) > BLOCKS:
        raise FarspanError(
            f"A picture of {length} tokens has blocks of {-(-length // BLOCKS)} to {length} tokens; got "
            f"{block!r}."
        )
    block = size
    method, decode = resolve(spec)
    if decode.selective and not method.selective:
        raise SpecError(
            f"inspect looks at a prefill, and {decode.name} leaves prefill dense: give a method that has one "
            "(farspan methods lists them)."
        )
    info = hf.inspect_model(model)
    chosen = _layers(info, layers)
    count = min(info.layer_info(i).num_heads for i in chosen)
    drawn = _within(heads, "head", range(count), HEADS)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(layer: int, q: Tensor, keys: Keys, selection: Selection) -> None:
        seen[layer] = _look(q, keys, selection, drawn, block)

    takes = None if decode.needs.recipe and not method.needs.recipe else recipe  # a decode's own is left out
    with patch(model, prefill=method, measure_mass=rows, recipe=takes) as patched:
        patched.watch({layer: partial(observe, layer) for layer in chosen})
        with torch.no_grad():
            model(ids.to(model.device), use_cache=False, logits_to_keep=1)
        report = patched.report(measure_mass=True)
    recalls = {x.layer: x.phases["prefill"].measured for x in report.layers}
    pictures = []
    for layer in chosen:
        (attention, read), measured = seen[layer], recalls[layer]
        assert measured is not None and measured.head_recall is not None
        visible = visible_pairs(length, length, block, block)
        pictures.append(
            LayerPicture(
                layer=layer,
                heads=drawn,
                block=block,
                length=length,
                attention=attention,
                read=read,
                density=((read.double() * visible).sum((1, 2)) / visible.sum()).tolist(),
                recall=[measured.head_recall[head] for head in drawn],
            )
        )
    return Inspection(method=str(method), length=length, report=report, pictures=pictures)


def _look(q: Tensor, keys: Keys, selection: Selection, heads: list[int], block: int) -> tuple[Tensor, Tensor]:
    """The true attention and what was read, [heads, N, N] each."""
    number = torch.tensor(heads, device=q.device)
    hkv, length = keys.kv.num_kv_heads, keys.length
    some, kv = q[:, number], keys.kv[:, number * hkv // q.shape[1]]
    lse = flash(some, kv, keys.softmax).lse
    attention = block_max(some, kv.k, lse, keys.softmax, block_q=block, block_k=block)[0]
    read = block_reads(selection, keys.tq, length, block, block, q.device)
    return attention.float().cpu(), read[number * read.shape[0] // q.shape[1]].cpu()


def _layers(info: hf.ModelInfo, layers: Sequence[int] | None) -> list[int]:
    served = [i for i in info.attention if info.kinds[i] != hf.SLIDING]
    if not served:
        raise FarspanError(
            "Every attention layer of this model keeps its own sliding window: nothing selects."
        )
    if layers is None:
        return [served[i] for i in _within(None, "layer", range(len(served)), LAYERS)]
    chosen = _within(layers, "layer", range(len(info.kinds)), LAYERS)
    for layer in chosen:
        if layer not in served:
            why = "keeps its own sliding window" if layer in info.attention else "has no attention"
            raise FarspanError(f"Layer {layer} {why}, so no method selects there; give another layer.")
    return chosen


def _within(given: Sequence[int] | None, what: str, known: range, most: int) -> list[int]:
    """The numbers given, each once, ascending; without any, at most ``most`` of ``known``, evenly spread."""
    if given is None:
        n, m = len(known), min(len(known), most)
        return sorted({round(i * (n - 1) / max(m - 1, 1)) for i in range(m)})
    chosen = set()
    for one in given:
        number = whole_number(one)
        if number is None or number not in known:
            raise FarspanError(f"There is no {what} {one}: the model has {what}s 0 to {known[-1]}.")
        chosen.add(number)
    if not chosen:
        raise FarspanError(f"No {what} was given; name at least one, from 0 to {known[-1]}.")
    return sorted(chosen)
