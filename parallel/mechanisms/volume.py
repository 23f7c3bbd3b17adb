"""How many bytes each way of sharing a layer's attention sends, and which way ``mechanism="auto"`` takes.

Plain arithmetic that every rank works out alike. P ranks; S tokens, padded as the split pads them; H query
and Hkv KV heads of d channels of e bytes; a partial's output has e_o bytes a channel and its lse 4 bytes.
Sent per rank and layer:

    gather, ring    (P - 1) / P * S * 2 Hkv d e
    ulysses         (P - 1) / P^2 * S * (2 H + 2 max(Hkv, P)) d e
    usp, P = U R    (U - 1) / U^2 * S / R * (2 H + 2 max(Hkv, U)) d e + (R - 1) / R * S * 2 ceil(Hkv / U) d e
    pass_q          (P - 1) / P * T * H (d (e + e_o) + 4)         for T new tokens, however much is cached
    decode          (P - 1) * H (d e_o + 4)                       per token
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from .layout import zigzag

MECHANISMS = ("gather", "ring", "ulysses", "usp", "pass_q")
LSE_SIZE = 4  # bytes of a partial's log-sum-exp


@dataclass(frozen=True)
class Geometry:
    """One attention layer: query heads, KV heads, channels of a head, and bytes of a number in q, k and v.

    out_size: bytes of a number in a partial's output as it travels; 0 means element_size.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_size: int
    out_size: int = 0

    @property
    def query(self) -> int:
        """Bytes of one token's q."""
        return self.num_heads * self.head_dim * self.element_size

    @property
    def kv(self) -> int:
        """Bytes of one token's k and v."""
        return 2 * self.num_kv_heads * self.head_dim * self.element_size

    @property
    def partial(self) -> int:
        """Bytes of one token's partial: output and lse of every head."""
        return self.num_heads * (self.head_dim * (self.out_size or self.element_size) + LSE_SIZE)

    def replicated(self, ranks: int) -> int:
        """Bytes of one token's k and v with the KV heads repeated until each of ``ranks`` has one."""
        return 2 * max(self.num_kv_heads, ranks) * self.head_dim * self.element_size


@dataclass(frozen=True)
class Choice:
    """What ``auto`` takes.

    reason: one sentence with the numbers. volumes, held: per rank and layer, bytes sent and bytes held for a
    while beside the rank's own share, by mechanism, of all that are possible. refused: why the others are
    not.
    """

    mechanism: str
    reason: str
    volumes: Mapping[str, int]
    held: Mapping[str, int]
    refused: Mapping[str, str] = field(default_factory=dict)


@lru_cache(4096)
def padded(tokens: int, ranks: int, block_multiple: int = 1) -> int:
    """Tokens computed by all ranks together, filling included: ``Split.rows`` times the ranks."""
    return zigzag(0, tokens, ranks, block_multiple).rows * ranks


def refusals(geometry: Geometry, ranks: int, past: int = 0, ulysses: int | None = None) -> dict[str, str]:
    """Why each mechanism that cannot serve these heads, or has no sense here, is left out; a clause each.

    ulysses: U of a 2-D mesh, ranks = U * R, such as the ranks of one node.
    """
    found = {}
    if clause := _heads(geometry, ranks):
        found["ulysses"] = clause
    if ulysses is None:
        found["usp"] = "no 2-D mesh was asked for and all ranks are on one node, or the nodes are not known"
    elif ranks % ulysses or not 1 < ulysses < ranks:
        found["usp"] = f"{ranks} ranks are no grid of several rows of {ulysses}"
    elif clause := _heads(geometry, ulysses):
        found["usp"] = clause
    if past == 0:
        found["pass_q"] = "nothing is cached yet"
    return found


def _heads(geometry: Geometry, ranks: int) -> str | None:
    """Why the heads cannot be spread over ``ranks`` ranks."""
    heads, kv_heads = geometry.num_heads, geometry.num_kv_heads
    if heads % ranks:
        return f"{ranks} ranks do not divide {heads} query heads"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} KV heads can neither be spread over {ranks} ranks nor repeated evenly"
    return None


def volumes(
    geometry: Geometry,
    ranks: int,
    new: int,
    past: int = 0,
    *,
    past_rows: int | None = None,
    ulysses: int | None = None,
    block_multiple: int = 1,
    batch: int = 1,
) -> dict[str, int]:
    """Bytes that each rank sends per layer to attend ``new`` tokens after ``past`` stored ones, by mechanism.

    past_rows: stored rows that each rank contributes, filling included (the most that any rank holds)
    [default: past / ranks, rounded up]. block_multiple: of the split. What is impossible is absent: see
    :func:`refusals`. All mechanisms but pass_q move the stored rows as well; only gather fills them up, so
    that where the ranks hold unlike numbers of them the others send less than told here.
    """
    rows, stored = _rows(ranks, new, past, past_rows, block_multiple)
    absent = refusals(geometry, ranks, past, ulysses)
    found = {"gather": (ranks - 1) * (rows + stored) * geometry.kv}
    found["ring"] = found["gather"]
    if "ulysses" not in absent:
        found["ulysses"] = _all_to_all(geometry, ranks, rows, stored)
    if "usp" not in absent:
        assert ulysses is not None
        ring = ranks // ulysses
        found["usp"] = _all_to_all(geometry, ulysses, rows, stored) + (ring - 1) * (
            rows + stored
        ) * geometry.replicated(ulysses)
    if "pass_q" not in absent:
        found["pass_q"] = (ranks - 1) * rows * (geometry.query + geometry.partial)
    return {name: batch * found[name] for name in MECHANISMS if name in found}


def _rows(ranks: int, new: int, past: int, past_rows: int | None, block_multiple: int) -> tuple[int, int]:
    return padded(new, ranks, block_multiple) // ranks, -(-past // ranks) if past_rows is None else past_rows


def _all_to_all(geometry: Geometry, ranks: int, rows: int, stored: int) -> int:
    """q, k, v to the ranks of their heads and the output back; of what is stored, k and v."""
    tokens = rows * 2 * geometry.query + (rows + stored) * geometry.replicated(ranks)
    return tokens // ranks * (ranks - 1)  # ranks divide the heads, and so the bytes


def held(
    geometry: Geometry,
    ranks: int,
    new: int,
    past: int = 0,
    *,
    past_rows: int | None = None,
    ulysses: int | None = None,
    block_multiple: int = 1,
    batch: int = 1,
) -> dict[str, int]:
    """Bytes that each rank holds for the time of one layer's attention beside its own q, k, v and output.

    gather: one layer's whole K and V. ring: the block at hand and the one that arrives. ulysses: q, K, V and
    output of all tokens for the rank's heads. usp: the same of its group, and the block that arrives. pass_q:
    all new tokens' q and their partials. All but the ring's twice: as they travel, and in the order of
    positions. Arguments as in :func:`volumes`.
    """
    rows, stored = _rows(ranks, new, past, past_rows, block_multiple)
    absent = refusals(geometry, ranks, past, ulysses)
    found = {
        "gather": 2 * ranks * (rows + stored) * geometry.kv,
        "ring": 2 * (rows + stored) * geometry.kv,
        "pass_q": 2 * ranks * rows * (geometry.query + geometry.partial),
        "ulysses": 4 * rows * geometry.query + 2 * (rows + stored) * geometry.replicated(ranks),
    }
    if ulysses is not None:
        found["usp"] = 4 * rows * geometry.query + 3 * (rows + stored) * geometry.replicated(ulysses)
    return {name: batch * found[name] for name in MECHANISMS if name in found and name not in absent}


def decode_volume(geometry: Geometry, ranks: int, tokens: int = 1, batch: int = 1) -> int:
    """Bytes that each rank sends per layer for ``tokens`` queries over a sharded cache: an all-gather of
    partials."""
    return (ranks - 1) * batch * tokens * geometry.partial


def window_volume(
    geometry: Geometry,
    ranks: int,
    new: int,
    window: int,
    past: int = 0,
    *,
    block_multiple: int = 1,
    batch: int = 1,
) -> int:
    """Bytes that a rank sends at most, the ranks' mean, for a sliding-window layer: a bit for every key and
    KV head to say what it reads, and the keys before each of its two chunks that the chunk's queries
    reach."""
    width = zigzag(0, new, ranks, block_multiple).width
    reach = min(2 * (window - 1), past + new - 2 * width) if ranks > 1 else 0
    bits = (ranks - 1) * geometry.num_kv_heads * -(-(past + new) // 8)
    return batch * (bits + max(0, reach) * geometry.kv)


def choose(
    geometry: Geometry,
    ranks: int,
    new: int,
    past: int = 0,
    *,
    past_rows: int | None = None,
    local_ranks: int | None = None,
    memory: int | None = None,
    block_multiple: int = 1,
    batch: int = 1,
) -> Choice:
    """What ``mechanism="auto"`` takes for ``new`` tokens after ``past``: the least volume of what is possible
    and fits, and gather where volumes are equal.

    local_ranks: ranks of one node; where there are several nodes, usp (Ulysses inside a node) is a candidate.
    memory: bytes that a rank can spare for one layer's attention; None for no limit. Where nothing fits, what
    holds least is taken. Other arguments as in :func:`volumes`.
    """
    nodes = local_ranks if local_ranks is not None and 1 < local_ranks < ranks else None
    how = {"past_rows": past_rows, "ulysses": nodes, "block_multiple": block_multiple, "batch": batch}
    sent = volumes(geometry, ranks, new, past, **how)  # type: ignore[arg-type]
    holds = held(geometry, ranks, new, past, **how)  # type: ignore[arg-type]
    refused = refusals(geometry, ranks, past, nodes)
    if ranks == 1:
        return Choice("gather", "One rank: nothing travels.", sent, holds, refused)
    fitting = [name for name in sent if memory is None or holds[name] <= memory]
    # The first of equals: gather before ring.
    best = min(fitting, key=sent.__getitem__) if fitting else min(holds, key=holds.__getitem__)
    return Choice(best, _reason(best, sent, holds, fitting, refused, memory), sent, holds, refused)


def _reason(
    best: str,
    sent: Mapping[str, int],
    holds: Mapping[str, int],
    fitting: list[str],
    refused: Mapping[str, str],
    memory: int | None,
) -> str:
    text = f"{best} sends {readable(sent[best])} per rank and layer"
    if others := [f"{name} {readable(sent[name])}" for name in fitting if sent[name] != sent[best]]:
        text += f" ({', '.join(others)})"
    if large := [f"{name} ({readable(holds[name])})" for name in sent if name not in [*fitting, best]]:
        assert memory is not None
        text += f"; {', '.join(large)} would hold more than the {readable(memory)} that are left"
    if best not in fitting:
        text += f", and so does {best} ({readable(holds[best])}), which needs least"
    if "ulysses" in refused:
        text += f"; ulysses is out: {refused['ulysses']}"
    return text + "."


def readable(count: float) -> str:
    """Bytes as people read them: 512 B, 1.5 MiB."""
    unit = 0
    while abs(count) >= 1000 and unit < 4:
        count, unit = count / 1024, unit + 1
    digits = 0 if unit == 0 or abs(count) >= 100 else 1
    return f"{count:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
