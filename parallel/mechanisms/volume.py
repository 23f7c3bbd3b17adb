"""The bytes that each mechanism sends for a layer's attention, and which one ``mechanism="auto"`` chooses.

Plain arithmetic; every rank computes the same numbers. There are P ranks, S tokens with split padding, and H
query and Hkv KV heads of d channels of e bytes. A partial has e_o bytes for each channel of its output, and 4
for its lse. Sent per rank and layer:

    gather, ring    (P - 1) / P * S * 2 Hkv d e
    ulysses         (P - 1) / P^2 * S * (2 H + 2 max(Hkv, P)) d e
    usp, P = U R    (U - 1) / U^2 * S / R * (2 H + 2 max(Hkv, U)) d e + (R - 1) / R * S * 2 ceil(Hkv / U) d e
    pass_q          (P - 1) / P * T * H (d (e + e_o) + 4)         for T new tokens, however much is cached
    decode          (P - 1) * H (d e_o + 4)                       per token
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from .layout import contiguous, zigzag

MECHANISMS = ("gather", "ring", "ulysses", "usp", "pass_q")
LSE_SIZE = 4  # bytes of a partial's log-sum-exp


@dataclass(frozen=True)
class Geometry:
    """The sizes of one attention layer. element_size: bytes of a number in q, k and v. out_size: bytes of a
    number in a partial's output while it travels; 0 means element_size."""

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
        """Bytes of one token's k and v, with the KV heads repeated so that each of ``ranks`` has one."""
        return 2 * max(self.num_kv_heads, ranks) * self.head_dim * self.element_size


@dataclass(frozen=True)
class PrefillCall:
    """One call of a prefill, divided among ranks.

    ranks: of the sequence. new, past: tokens of the call, and stored ones before it. past_rows: stored tokens
    that each rank contributes, those of the fullest rank; None: past / ranks, rounded up. ulysses: U of ranks
    = U
    * R, such as the ranks of one node; None: there is no such grid. block_multiple: of the split. batch: rows
    of the batch. in_order: each rank has one contiguous shard, because a layer passes a state along the
    sequence; otherwise two chunks of a zigzag.
    """

    ranks: int
    new: int
    past: int = 0
    past_rows: int | None = None
    ulysses: int | None = None
    block_multiple: int = 1
    batch: int = 1
    in_order: bool = False

    @property
    def rows(self) -> int:
        """Tokens that each rank computes, with split padding."""
        return padded(self.new, self.ranks, self.block_multiple, self.in_order) // self.ranks

    @property
    def stored(self) -> int:
        """Stored tokens that each rank contributes."""
        return -(-self.past // self.ranks) if self.past_rows is None else self.past_rows


@dataclass(frozen=True)
class Choice:
    """The mechanism that "auto" chooses.

    reason: one sentence with the numbers. volumes, held: by possible mechanism, per rank and layer: bytes
    sent, and bytes held during the layer beside the rank's own tensors. refused: why each other one is
    impossible.
    """

    mechanism: str
    reason: str
    volumes: Mapping[str, int]
    held: Mapping[str, int]
    refused: Mapping[str, str] = field(default_factory=dict)


@lru_cache(4096)
def padded(tokens: int, ranks: int, block_multiple: int = 1, in_order: bool = False) -> int:
    """Tokens that all ranks compute, with split padding: ``Split.rows`` times the number of ranks."""
    split = contiguous if in_order else zigzag
    return split(0, tokens, ranks, block_multiple).rows * ranks


def refusals(geometry: Geometry, ranks: int, past: int = 0, ulysses: int | None = None) -> dict[str, str]:
    """By mechanism that is impossible or pointless here: the reason, as a clause.

    ulysses: U of ranks = U * R, such as the ranks of one node; None: there is no such grid.
    """
    found = {}
    if clause := _heads(geometry, ranks):
        found["ulysses"] = clause
    if ulysses is None:
        found["usp"] = "there is no 2-D mesh, and all ranks are on one node or the nodes are not known"
    elif ranks % ulysses or not 1 < ulysses < ranks:
        found["usp"] = f"{ranks} ranks do not form several groups of {ulysses}"
    elif clause := _heads(geometry, ulysses):
        found["usp"] = clause
    if past == 0:
        found["pass_q"] = "nothing is cached yet"
    return found


def _heads(geometry: Geometry, ranks: int) -> str | None:
    """Why the heads cannot be divided among ``ranks`` ranks; None where they can."""
    heads, kv_heads = geometry.num_heads, geometry.num_kv_heads
    if heads % ranks:
        return f"{ranks} ranks do not divide {heads} query heads"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} KV heads can neither be divided among {ranks} ranks nor repeated evenly"
    return None


def volumes(geometry: Geometry, call: PrefillCall) -> dict[str, int]:
    """Bytes that each rank sends per layer in ``call``, by mechanism. Impossible mechanisms are absent: see
    :func:`refusals`.

    All mechanisms except pass_q move the stored tokens as well. Only gather pads them to those of the fullest
    rank, so where the ranks hold unequal numbers the other mechanisms send less than this.
    """
    ranks, rows, keys = call.ranks, call.rows, call.rows + call.stored
    absent = refusals(geometry, ranks, call.past, call.ulysses)
    found = {"gather": (ranks - 1) * keys * geometry.kv}
    found["ring"] = found["gather"]
    if "ulysses" not in absent:
        found["ulysses"] = _all_to_all(geometry, ranks, call)
    if "usp" not in absent:
        assert call.ulysses is not None
        ring = (ranks // call.ulysses - 1) * keys * geometry.replicated(call.ulysses)
        found["usp"] = _all_to_all(geometry, call.ulysses, call) + ring
    if "pass_q" not in absent:
        found["pass_q"] = (ranks - 1) * rows * (geometry.query + geometry.partial)
    return {name: call.batch * found[name] for name in MECHANISMS if name in found}


def _all_to_all(geometry: Geometry, ranks: int, call: PrefillCall) -> int:
    """q, k and v to the ranks of their heads, and the output back; k and v of the stored tokens. In a group
    of ``ranks``."""
    tokens = call.rows * 2 * geometry.query + (call.rows + call.stored) * geometry.replicated(ranks)
    return tokens // ranks * (ranks - 1)  # ranks divide the heads, and so the bytes


def held_bytes(geometry: Geometry, call: PrefillCall) -> dict[str, int]:
    """Bytes that each rank holds during one layer's attention beside its own q, k, v and output, by
    mechanism.

    gather: the layer's whole K and V. ring: the block in use and the one that arrives. ulysses: q, K, V and
    output of all tokens for the rank's heads. usp: the same for the tokens of its group, and the block that
    arrives. pass_q: q and the partials of all new tokens. All of these are held twice, as they travel and in
    the order of positions, except the blocks of a ring.
    """
    rows, keys = call.rows, call.rows + call.stored
    absent = refusals(geometry, call.ranks, call.past, call.ulysses)
    found = {
        "gather": 2 * call.ranks * keys * geometry.kv,
        "ring": 2 * keys * geometry.kv,
        "pass_q": 2 * call.ranks * rows * (geometry.query + geometry.partial),
        "ulysses": 4 * rows * geometry.query + 2 * keys * geometry.replicated(call.ranks),
    }
    if call.ulysses is not None:
        found["usp"] = 4 * rows * geometry.query + 3 * keys * geometry.replicated(call.ulysses)
    return {name: call.batch * found[name] for name in MECHANISMS if name in found and name not in absent}


def decode_volume(geometry: Geometry, ranks: int, tokens: int = 1, batch: int = 1) -> int:
    """Bytes that each rank sends per layer for ``tokens`` queries over a sharded cache: an all-gather of
    partials."""
    return (ranks - 1) * batch * tokens * geometry.partial


def window_volume(geometry: Geometry, call: PrefillCall, window: int) -> int:
    """Bytes that a rank sends for a layer with a sliding window: an upper bound, the mean over the ranks.

    A bit for every key and KV head says which keys the rank reads. Then the keys move that lie before its
    chunks, as far as their queries reach.
    """
    ranks, length = call.ranks, call.past + call.new
    chunks = 1 if call.in_order else 2
    reach = min(chunks * (window - 1), length - call.rows) if ranks > 1 else 0
    bits = (ranks - 1) * geometry.num_kv_heads * -(-length // 8)
    return call.batch * (bits + max(0, reach) * geometry.kv)


def choose(geometry: Geometry, call: PrefillCall, memory: int | None = None) -> Choice:
    """The mechanism that "auto" chooses: of those that are possible and fit into ``memory``, the one that
    sends least, and gather where volumes are equal. Where none fits, the one that holds least.

    call: its ``ulysses`` is the number of ranks of one node; with several nodes usp (Ulysses inside a node)
    is a candidate. memory: bytes that a rank can spare for one layer's attention; None: no limit.
    """
    if call.ulysses is not None and not 1 < call.ulysses < call.ranks:
        call = replace(call, ulysses=None)
    sent, holds = volumes(geometry, call), held_bytes(geometry, call)
    refused = refusals(geometry, call.ranks, call.past, call.ulysses)
    if call.ranks == 1:
        return Choice("gather", "One rank: nothing travels.", sent, holds, refused)
    fitting = [name for name in sent if memory is None or holds[name] <= memory]
    # Of equal ones the first: gather before ring.
    name = min(fitting, key=sent.__getitem__) if fitting else min(holds, key=holds.__getitem__)
    return Choice(name, _reason(name, sent, holds, fitting, refused, memory), sent, holds, refused)


def _reason(
    chosen: str,
    sent: Mapping[str, int],
    holds: Mapping[str, int],
    fitting: list[str],
    refused: Mapping[str, str],
    memory: int | None,
) -> str:
    text = f"{chosen} sends {readable(sent[chosen])} per rank and layer"
    if others := [f"{name} {readable(sent[name])}" for name in fitting if sent[name] != sent[chosen]]:
        text += f" ({', '.join(others)})"
    if large := [f"{name} ({readable(holds[name])})" for name in sent if name not in [*fitting, chosen]]:
        assert memory is not None
        text += f"; {', '.join(large)} would hold more than the {readable(memory)} that is left"
    if chosen not in fitting:
        text += f", and so does {chosen} ({readable(holds[chosen])}), which needs least"
    if "ulysses" in refused:
        text += f"; ulysses cannot be used: {refused['ulysses']}"
    return text + "."


def readable(count: float) -> str:
    """Bytes with a unit: 512 B, 1.5 MiB."""
    unit = 0
    while abs(count) >= 1000 and unit < 4:
        count, unit = count / 1024, unit + 1
    digits = 0 if unit == 0 or abs(count) >= 100 else 1
    return f"{count:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
