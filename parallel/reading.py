"""What part of the keys a method reads, told from its parameters without running it."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention.method import DECODE, AttentionMethod
from ..attention.sparse.double_sparsity import LABELS


@dataclass(frozen=True)
class Reading:
    """Parts of the visible keys and values.

    kv: those attended to. selection: bytes read to decide which, in the same measure. candidates: single keys
    of a KV head that each rank offers for the cut over all ranks, per token.
    """

    kv: float = 1.0
    selection: float = 0.0
    candidates: float = 0.0


def reading(method: AttentionMethod, phase: str, length: int, head_dim: int = 128) -> Reading:
    """What ``method`` reads of ``length`` keys in a phase.

    From its budget: k / length or fraction, a window's w + sinks, and for a stride every stride-th step
    whole. It decides by labels of D / group_factor channels of ``head_dim`` (32 where none is given), by two
    bounds a page, by a mean a block, or at a full step by every key. A method with another kind of budget
    counts as dense.
    """
    fraction, k, w, stride = (getattr(method, name, None) for name in ("fraction", "k", "w", "stride"))
    tokens = fraction * length if fraction is not None else (k or 0) + (w or 0) + getattr(method, "sinks", 0)
    if phase not in method.phases or not tokens or tokens >= length:
        return Reading()
    part, selection, candidates = tokens / length, 0.0, 0.0
    if hasattr(method, "group_factor"):
        labels = 1 / method.group_factor if method.group_factor else min(1.0, LABELS / head_dim)
        selection, candidates = labels / 2, tokens
    elif page := getattr(method, "page", None):
        selection = 1 / page
    elif (block := getattr(method, "block", None)) and phase == DECODE:
        selection = 1 / (2 * block)
    if stride:
        return Reading(part + (1 - part) / stride, 1 / (2 * stride), tokens / stride)
    return Reading(part, selection, candidates)
