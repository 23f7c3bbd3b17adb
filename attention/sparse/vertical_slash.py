"""MInference's vertical-slash: the columns and the diagonals that a prompt's last queries attend to."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..budget import select_topk
from ..cost import Cost, Queries
from ..errors import FarspanError, SpecError
from ..gqa import reduce_group
from ..index import BlockIndex, Index
from ..keys import Keys, State
from ..method import AttentionMethod, LayerInfo, require
from ..needs import Needs
from ..ops.select import by_mass, by_threshold
from ..received import columns_and_diagonals

_MOST = 2**31 - 1  # of a budget


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(AttentionMethod):
    """Exact attention over each head's best columns and diagonals (MInference 1.0, 2407.02490).

    The causal attention of the call's last ``last`` queries is added up per key (a column, "vertical") and
    per distance of query and key (a diagonal, "slash"). A head reads ``vertical`` columns, the first
    ``sinks`` keys always among them, and ``slash`` diagonals, the nearest ``local`` always among them. A
    query block a .. a + b - 1 (b = ``block``) reads of the diagonal at distance s the keys a - s ..
    a + b - 1 - s, all of them with every query. The defaults are MInference's for a head that it has no
    better budgets for.

    Budgets per head: ``config``, a file in MInference's format (per layer and query head a pattern,
    ``vertical`` and ``slash``), as its users have them from its search, a head that is not in it having the
    general budgets; or ``mass``, the fewest columns and the fewest diagonals that each hold that share of the
    head's attention (the rule of FlexPrefill, 2502.20766), instead of the numbers. gqa_reduce: whether the
    heads of a group have one pattern, by the "sum" or the "max" of their attention, or each its own ("none",
    the paper's).

    As blocks: the keys of no column stand first, in order, then the columns (``key_order``), so that columns
    cost no more than they hold. Of the former a block is read where a diagonal passes between its first and
    its last key, besides the one with the query block's latest key: what that adds to the pattern are the
    rims of blocks (MInference's begin anywhere, and columns are read one by one). The sums need every raw
    key. A chunk of a prompt is judged by its own last queries, so that chunks read other keys than the prompt
    whole would (law 3 does not hold): each chunk the definition's.
    """

    name: ClassVar[str] = "vertical_slash"
    title: ClassVar[str] = "Vertical-slash (MInference)"
    paper: ClassVar[str] = "2407.02490"
    lookahead: ClassVar[str] = "prompt"
    needs: ClassVar[Needs] = Needs(keys=True)

    vertical: int = 1000
    slash: int = 6096
    mass: float | None = None
    config: str = ""
    block: int = 64
    last: int = 64
    sinks: int = 30
    local: int = 100
    gqa_reduce: str = "none"
    budgets: Tensor | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, vertical=(1, None), slash=(1, None), mass=(1e-6, 1.0), block=(1, None), last=(1, None))
        require(self, sinks=(0, None), local=(1, None), gqa_reduce=("sum", "max", "none"))
        if self.config and (self.mass is not None or self.gqa_reduce != "none"):
            raise SpecError(
                "vertical_slash takes config=PATH, budgets of single heads, with neither mass nor "
                f"gqa_reduce; got mass={self.mass}, gqa_reduce={self.gqa_reduce}."
            )

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        if not self.config:
            return self
        layers = _load(self.config)
        if layer.index >= len(layers):
            raise FarspanError(
                f"{self.config} has budgets for {len(layers)} layers and none for layer {layer.index}: it "
                "was made for another model."
            )
        heads, count = layers[layer.index], layer.num_heads * layer.tp_size
        if any(head >= count for head in heads):
            raise FarspanError(
                f"{self.config} has budgets for more than the {count} query heads of layer {layer.index}: it "
                "was made for another model."
            )
        table = [heads.get(head, (self.vertical, self.slash)) for head in range(count)]
        return replace(self, budgets=layer.own(torch.tensor(table)))

    @property
    def couples_heads(self) -> bool:
        return self.budgets is not None  # they are of the heads it was bound to, and of no others

    @property
    def block_multiple(self) -> int:
        return self.block

    @property
    def last_queries(self) -> int:
        return self.last

    def reads(self, queries: Queries) -> Cost:
        """At most: the columns, those beside them in their first block, the latest block, and two blocks for
        every diagonal. How many blocks the diagonals share depends on the data."""
        length, sizes = queries.length, self._sizes()
        if self._covers(length, sizes):
            return queries.cost()
        selection = queries.raw_keys(length)
        if self.mass is not None or (self.config and self.budgets is None):
            return queries.cost(selection=selection, exact=False)
        most = sizes[:, 0] + (2 * sizes[:, 1] + 2) * self.block  # of each head
        keys = torch.minimum(queries.seen[:, None], most).double().mean(1)
        return queries.cost(keys, selection=selection, exact=False)

    def _sizes(self) -> Tensor:
        """[1 or H, 2]: columns and diagonals."""
        return torch.tensor([[self.vertical, self.slash]]) if self.budgets is None else self.budgets

    def _covers(self, length: int, sizes: Tensor) -> bool:
        return self.mass == 1 or (self.mass is None and int(sizes.amax(1).min()) >= length)

    def prepare_prefill(self, q: Tensor, keys: Keys) -> State:
        """columns [1, Hs, T] bool: which keys they are; nearer [1, Hs, T + 1]: how many diagonals are nearer
        than each distance. Nothing where every key is read."""
        sizes = self._sizes()
        if self._covers(keys.length, sizes):
            return {}
        most = sizes.amax(0).tolist()
        columns, diagonals = columns_and_diagonals(q, keys)
        sizes = sizes.to(q.device)
        columns = self._best(columns, sizes[:, 0], most[0], self.sinks)
        diagonals = self._best(diagonals, sizes[:, 1], most[1], self.local)
        return {"columns": columns, "nearer": pad(diagonals.cumsum(-1), (1, 0))}

    def _best(self, x: Tensor, size: Tensor, most: int, always: int) -> Tensor:
        """[1, Hs, T] bool: the highest of x [1, Hkv, G, T], as many as the budget says, the first ``always``
        whatever they hold."""
        x = reduce_group(x, self.gqa_reduce)
        n = x.shape[-1]
        if self.mass is None:
            ranked = x.masked_fill(torch.arange(n, device=x.device) < always, torch.inf)
            chosen, counts = select_topk(ranked, size.clamp(max=n).expand(x.shape[:2]), min(most, n))
        else:
            chosen, counts = by_mass(x, self.mass)
        assert counts is not None
        used = torch.arange(chosen.shape[-1], device=x.device) < counts[..., None]
        best = torch.zeros(*x.shape[:-1], n + 1, dtype=torch.bool, device=x.device)
        best = best.scatter_(-1, torch.where(used, chosen, n), True)[..., :n]
        if self.mass is not None:
            best[..., :always] = True
        return best

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if not keys.prepared:
            return None
        columns, nearer = keys.prepared["columns"][..., : keys.length], keys.prepared["nearer"]
        order = columns.to(torch.int8).argsort(dim=-1, stable=True)  # [1, Hs, length], the columns last
        begin = torch.arange(keys.past, keys.length, self.block, device=q.device)[:, None]  # [Nq, 1]
        end = (begin + self.block).clamp(max=keys.length)
        rows, everything = [], True
        heads = zip(columns.flatten(0, 1), order.flatten(0, 1), nearer.flatten(0, 1), strict=True)
        for head in heads:  # its [Nq, Nk] at a time
            read, there = self._blocks(*head, begin, end)
            everything = everything and bool((read | ~there).all())
            rows.append(by_threshold(read.float(), 0.5))
        if everything:
            return None
        room = max(blocks.shape[1] for blocks, _ in rows)
        blocks = torch.stack([pad(blocks.int(), (0, room - blocks.shape[1])) for blocks, _ in rows])
        return BlockIndex(
            blocks=blocks.unflatten(0, order.shape[:2]),
            counts=torch.stack([counts for _, counts in rows]).unflatten(0, order.shape[:2]),
            block_q=self.block,
            block_k=self.block,
            key_order=order.int(),
        )

    def _blocks(
        self, columns: Tensor, order: Tensor, nearer: Tensor, begin: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[Nq, Nk] bool, of one head: which blocks of keys in ``order`` are read, and which hold a visible
        key."""
        length, block = len(order), self.block
        places = pad(order, (0, -length % block), value=length).view(-1, block)
        first, last = places[:, 0], places[:, -1].clamp(max=length)
        there = places.amin(1) < end
        others = (~columns).cumsum(0)
        passing = nearer[(end - first).clamp(min=0)] > nearer[(begin - last).clamp(min=0)]
        cols = torch.arange(len(places), device=order.device)
        latest = cols == (others[end - 1] - 1) // block  # holds the latest key of no column
        return torch.where(cols < others[-1] // block, passing | latest, there), there


def _load(path: str) -> list[dict[int, tuple[int, int]]]:
    """Per layer and head of a file of MInference's its (vertical, slash), read anew once it has changed.
    Raises FarspanError."""
    try:
        about = Path(path).stat()
    except OSError as error:
        raise FarspanError(f"{path} is no file of MInference's patterns: {error.strerror}.") from error
    return _read(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int) -> list[dict[int, tuple[int, int]]]:
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FarspanError(f"{path} is no file of MInference's patterns: {error}.") from error
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise FarspanError(
            f"{path} is no file of MInference's patterns: that is a list with one object per layer, each of "
            'query heads as in {"0": ["vertical_and_slash", 1000, 6096, 1]}.'
        )
    found = [
        {_head(path, i, head): _budgets(path, i, head, entry) for head, entry in layer.items()}
        for i, layer in enumerate(layers)
    ]
    if not any(found):
        raise FarspanError(f"{path} has budgets for no head; take the file of a search, or leave config out.")
    return found


def _head(path: str, layer: int, head: str) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,5}", head):
        raise FarspanError(f"{path} numbers query heads 0, 1, ... in each layer; layer {layer} has {head!r}.")
    return int(head)


def _budgets(path: str, layer: int, head: str, entry: Any) -> tuple[int, int]:
    if isinstance(entry, list) and entry and isinstance(entry[0], str) and entry[0] != "vertical_and_slash":
        raise FarspanError(
            f"{path} gives head {head} of layer {layer} the pattern {entry[0]}; vertical_slash serves "
            "vertical_and_slash alone."
        )
    match entry:
        case [str(), int(vertical), int(slash), *_] if _whole(vertical) and _whole(slash):
            return vertical, slash
    raise FarspanError(
        f'A head has ["vertical_and_slash", VERTICAL, SLASH, ...] in {path}, both whole numbers from 1 to '
        f"{_MOST}; head {head} of layer {layer} has {json.dumps(entry)[:60]}."
    )


def _whole(number: int) -> bool:
    return type(number) is int and 1 <= number <= _MOST
