"""Inspect the prefill of one prompt: what a method read of the true attention, by layer and block."""

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
from .patch import patch
from .recipe import Recipe
from .report import Report
from .specs import resolve

LAYERS, HEADS = 4, 6  # number of layers and heads in pictures where the caller names none
BLOCK = 64  # tokens; a shorter prompt is one block
BLOCKS = 4096  # the most blocks along one side of a picture


@dataclass(frozen=True, kw_only=True)
class LayerPicture:
    """The attention of some query heads of one layer and what they read, in blocks of ``block`` queries and
    keys.

    attention [heads, N, N] float32: the largest causal attention probability in each block (``block_max``).
    read [heads, N, N] float32: the fraction of the visible (query, key) pairs of each block that was read.
    Keys are at their original positions, also where the method reorders them. attention and read are 0 in
    blocks without a visible pair.
    density: for each head, the fraction of the visible pairs that was read.
    recall: for each head, the fraction of the true attention that was read, on sampled queries.
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
    """A prefill of ``length`` tokens by ``method``: the report of all layers with measured values, and the
    pictures of some layers."""

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
    """Run the prefill of one prompt under the prefill method of ``spec``, and return what it read.

    inputs: token ids [1, T], or a mapping with ``input_ids``.
    layers, heads: the layers and query heads to make pictures of. By default up to 4 layers and 6 heads are
    taken, evenly spaced.
    block: tokens along each side of a block of the pictures.
    rows: number of queries per layer on which the recall of attention mass is measured, evenly spaced.

    No tensor of size T x T is made. The true attention of the pictures costs as much as dense attention of
    their heads.

    Raises SpecError for a spec without a prefill method. Raises FarspanError for layers, heads or blocks that
    do not exist, and for a batch of several rows. Raises what ``patch`` raises.
    """
    ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise FarspanError(
            f"inspect takes the ids of one prompt, [1, T] with at least one token; got {list(ids.shape)}."
        )
    length = ids.shape[1]
    size = whole_number(block)
    if size is None or not 1 <= size <= max(length, BLOCK) or -(-length // size) > BLOCKS:
        raise FarspanError(
            f"A picture of {length} tokens can have blocks of {-(-length // BLOCKS)} to {length} tokens; got "
            f"{block!r}."
        )
    block = size
    method, decode = resolve(spec)
    if decode.selective and not method.selective:
        raise SpecError(
            f"inspect shows a prefill, but {decode.name} leaves prefill dense: give a method that has a "
            "prefill (farspan methods lists them)."
        )
    info = hf.inspect_model(model)
    chosen = _layers(info, layers)
    count = min(info.layer_info(i).num_heads for i in chosen)
    drawn = _within(heads, "head", range(count), HEADS)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(layer: int, q: Tensor, keys: Keys, selection: Selection) -> None:
        seen[layer] = _look(q, keys, selection, drawn, block)

    takes = None if decode.needs.recipe and not method.needs.recipe else recipe  # not the decode method's
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
    """(true attention, fraction read), [heads, N, N] each."""
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
            "Every attention layer of this model has the model's own sliding window, so no method selects "
            "there: inspect another model."
        )
    if layers is None:
        return [served[i] for i in _within(None, "layer", range(len(served)), LAYERS)]
    chosen = _within(layers, "layer", range(len(info.kinds)), LAYERS)
    for layer in chosen:
        if layer not in served:
            why = "has the model's own sliding window" if layer in info.attention else "has no attention"
            raise FarspanError(f"Layer {layer} {why}, so no method selects there: give another layer.")
    return chosen


def _within(given: Sequence[int] | None, what: str, known: range, most: int) -> list[int]:
    """The given numbers, each once, ascending. For None, at most ``most`` numbers of ``known``, evenly
    spaced."""
    if given is None:
        n, m = len(known), min(len(known), most)
        return sorted({round(i * (n - 1) / max(m - 1, 1)) for i in range(m)})
    chosen = set()
    for one in given:
        number = whole_number(one)
        if number is None or number not in known:
            raise FarspanError(
                f"There is no {what} {one}: the model has {what}s 0 to {known[-1]}, name one of these."
            )
        chosen.add(number)
    if not chosen:
        raise FarspanError(f"No {what} was given; name at least one, from 0 to {known[-1]}.")
    return sorted(chosen)
