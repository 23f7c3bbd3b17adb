"""MInference's vertical-slash: the columns and the diagonals that a prompt's last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import require
from ..cost import Cost, Queries
from ..diagonals import columns_and_diagonals
from ..errors import SpecError
from ..gqa import reduce_group
from ..keys import Keys, State
from ..lookahead import Lookahead
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..selection import Index
from .minference import head_budgets
from .slash_blocks import highest, holding_mass, slash_blocks


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(AttentionMethod):
    """Exact attention over each head's best columns and diagonals (MInference 1.0, 2407.02490).

    The causal attention of the call's last ``last`` queries is summed per key (a column, "vertical") and per
    distance of query and key (a diagonal, "slash"). A head reads ``vertical`` columns, the first ``sinks``
    keys among them, and ``slash`` diagonals, the nearest ``local`` among them. A query block a .. a + b - 1
    (b = ``block``) reads of the diagonal at distance s the keys a - s .. a + b - 1 - s with every query. The
    defaults are MInference's for a head without better budgets.

    Budgets per head: ``config``, a file in MInference's format (per layer and query head a pattern,
    ``vertical`` and ``slash``) as its search writes it; a head that is not in it has the general budgets. Or
    ``mass`` instead of numbers: the fewest columns and the fewest diagonals that each hold that share of the
    head's attention (the rule of FlexPrefill, 2502.20766). gqa_reduce: one pattern for the heads of a group,
    by the "sum" or the "max" of their attention, or one per head ("none", the paper's).

    As blocks (``slash_blocks``): keys that are no column come first, then the columns (``key_order``), so
    that a column costs one key. A block of the former is read where a diagonal passes between its first and
    its last key, and where the query block's latest key is in it. This adds the rims of blocks to the pattern
    (MInference's blocks begin anywhere, and it reads columns one by one). The sums need every raw key. Each
    chunk of a prompt selects by its own last queries, so chunks read other keys than the whole prompt would
    (law 3 does not hold); each chunk follows the definition.
    """

    name: ClassVar[str] = "vertical_slash"
    title: ClassVar[str] = "Vertical-slash (MInference)"
    paper: ClassVar[str] = "2407.02490"

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
        return replace(self, budgets=head_budgets(self.config, layer, (self.vertical, self.slash)))

    @property
    def files(self) -> tuple[str, ...]:
        return (self.config,) if self.config else ()

    @property
    def couples_heads(self) -> bool:
        return self.budgets is not None  # they belong to the heads that it was bound to

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.prompt()

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

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
        upper = sizes[:, 0] + (2 * sizes[:, 1] + 2) * self.block  # of each head
        keys = torch.minimum(queries.seen[:, None], upper).double().mean(1)
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
        largest = sizes.amax(0).tolist()
        columns, diagonals = columns_and_diagonals(q, keys)
        sizes = sizes.to(q.device, non_blocking=True)
        columns = self._chosen(columns, sizes[:, 0], largest[0], self.sinks)
        diagonals = self._chosen(diagonals, sizes[:, 1], largest[1], self.local)
        return {"columns": columns, "nearer": pad(diagonals.cumsum(-1), (1, 0))}

    def _chosen(self, x: Tensor, size: Tensor, max_size: int, always: int) -> Tensor:
        x = reduce_group(x, self.gqa_reduce)
        if self.mass is None:
            return highest(x, size, max_size, always)
        return holding_mass(x, self.mass, always)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if not keys.prepared:
            return None
        columns, nearer = keys.prepared["columns"][..., : keys.length], keys.prepared["nearer"]
        return slash_blocks(columns, nearer, keys.past, self.block)
