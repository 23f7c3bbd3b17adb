"""Static patterns: the keys read depend on positions alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import Grid
from ..cost import Cost, Queries
from ..errors import FarspanError, SpecError
from ..index import Band, Bands, BlockIndex, Index, TokenIndex, Window
from ..keys import Keys
from ..method import AttentionMethod, require
from ..ops.select import by_threshold


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(AttentionMethod):
    """The last w keys and the first ``sinks`` keys of each row: StreamingLLM's pattern (2309.17453) on an
    unevicted cache.

    Positions are the tokens' own; nothing is evicted, so a later method or a crop finds every key in place.
    """

    name: ClassVar[str] = "window"
    title: ClassVar[str] = "Sliding window with attention sinks (StreamingLLM)"
    paper: ClassVar[str] = "2309.17453"

    w: int = 1024
    sinks: int = 4

    def __post_init__(self) -> None:
        require(self, w=(1, None), sinks=(0, None))

    def reads(self, queries: Queries) -> Cost:
        return queries.cost(queries.seen.clamp(max=self.w + self.sinks), reach=self.w + self.sinks)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def _select(self, keys: Keys) -> Index:
        return None if keys.longest() <= self.w + self.sinks else Window(size=self.w, sinks=self.sinks)


# --- keys at regular distances -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dilated(AttentionMethod):
    """Every d-th of the last keys, w of them: dilated neighbourhood attention (2209.15001) in its causal 1-D
    form (2403.04690), at dilation d = ``dilation``.

        w = 3, dilation = 2      key   0 1 2 3 4 5 6 7
                           query 7     . . . x . x . x

    Query i reads i, i - d, .., i - (w - 1) d, as far as there are keys; besides, the first ``sinks`` keys of
    its row, 0 in the papers. The defaults are the dilated baseline of MInference (2407.02490). With
    dilation > 1 no w reads everything.
    """

    name: ClassVar[str] = "dilated"
    title: ClassVar[str] = "Dilated neighbourhood attention, causal"
    paper: ClassVar[str] = "2209.15001"

    w: int = 4096
    dilation: int = 2
    sinks: int = 1024

    def __post_init__(self) -> None:
        require(self, w=(1, None), dilation=(1, None), sinks=(0, None))

    @property
    def bands(self) -> Bands:
        """The distances."""
        return Bands(bands=(Band(self.dilation, 0, self.w * self.dilation),), sinks=self.sinks)

    def reads(self, queries: Queries) -> Cost:
        return queries.cost(self.bands.count(queries.seen), reach=self.w * self.dilation + self.sinks)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return None if self._covers(keys) else self.bands

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return None if self._covers(keys) else tokens(self.bands, keys)

    def _covers(self, keys: Keys) -> bool:
        near = self.w if self.dilation == 1 else 1
        return keys.longest() <= near + self.sinks


@dataclass(frozen=True, kw_only=True)
class Strided(AttentionMethod):
    """The last w keys, and every l-th key before them: the strided pattern of Sparse Transformers
    (1904.10509), both of its parts in each head, at stride l = ``stride``.

        w = 3, stride = 4      key   0 1 2 3 4 5 6 7 8 9
                         query 9     . x . . . x . x x x

    Query i reads j where i - j < w or (i - j) mod l = 0; with ``reach``, only where i - j < reach; besides,
    the first ``sinks`` keys of its row, 0 in the paper, which takes w = l. MInference's strided baseline
    (2407.02490) is w=2048,stride=2,reach=6144,sinks=1024.
    """

    name: ClassVar[str] = "strided"
    title: ClassVar[str] = "Strided sparse attention (Sparse Transformers)"
    paper: ClassVar[str] = "1904.10509"

    w: int = 128
    stride: int = 128
    reach: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        require(self, w=(1, None), stride=(1, None), reach=(1, None), sinks=(0, None))
        if self.reach is not None and self.reach < self.w:
            raise SpecError(f"strided takes a reach of at least w; got reach={self.reach}, w={self.w}.")

    @property
    def bands(self) -> Bands:
        """The distances: the window, and the multiples of the stride beyond it."""
        beyond = -(-self.w // self.stride) * self.stride
        return Bands(bands=(Band(1, 0, self.w), Band(self.stride, beyond, self.reach)), sinks=self.sinks)

    def reads(self, queries: Queries) -> Cost:
        reach = None if self.reach is None else self.reach + self.sinks
        return queries.cost(self.bands.count(queries.seen), reach=reach)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return None if keys.longest() <= self.w + self.sinks else self.bands

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return None if keys.longest() <= self.w + self.sinks else tokens(self.bands, keys)


def tokens(index: Bands, keys: Keys) -> TokenIndex:
    """The keys that each decode query reads, one by one, the query's own first."""
    device, length = keys.kv.device, keys.longest()
    ends = [length if band.far is None else min(band.far, length) for band in index.bands]
    near = torch.cat(
        [torch.arange(n, max(n, end), s) for (s, n, _), end in zip(index.bands, ends, strict=True)]
    ).to(device)
    first = torch.zeros(1, dtype=torch.long, device=device) if keys.start is None else keys.start
    rows = torch.arange(keys.past, keys.length, device=device)[:, None]
    sinks = (first[:, None] + torch.arange(index.sinks, device=device))[:, None]  # [B or 1, 1, sinks]
    distance = rows - sinks
    fresh = (distance >= 0) & ~index.hold(distance.clamp(min=0))  # [B or 1, Tq, sinks]
    chosen = torch.cat([(rows - near).expand(*fresh.shape[:2], -1), sinks.expand(*fresh.shape)], 2)
    read = torch.cat([rows - near >= first[:, None, None], fresh], 2)
    order = (~read).int().sort(dim=2, stable=True).indices  # what is read comes first
    counts = read.sum(2)
    room = chosen.shape[2] if device.type != "cpu" else int(counts.max())
    chosen = chosen.gather(2, order[..., :room])
    within = torch.arange(room, device=device) < counts[..., None]
    chosen = torch.where(within, chosen, chosen[..., :1])
    shape = (keys.kv.batch, keys.kv.num_kv_heads, keys.tq)
    return TokenIndex(tokens=chosen[:, None].expand(*shape, room), counts=counts[:, None].expand(shape).int())


# --- whole blocks ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AShape(AttentionMethod):
    """The first blocks and the last: MInference's static A-shape head (2407.02490), in whole blocks.

    A block of ``block`` queries reads the key blocks that hold the first ``sinks`` keys, and those that hold
    the last w keys of any of its queries. Query blocks are counted from the row's first position, wherever a
    prompt is cut. The defaults are what MInference sets its StreamingLLM baseline to; the pattern token by
    token is ``window``. Decode is dense.
    """

    name: ClassVar[str] = "a_shape"
    title: ClassVar[str] = "A-shape (MInference's static pattern)"
    paper: ClassVar[str] = "2407.02490"

    w: int = 4096
    sinks: int = 1024
    block: int = 64

    def __post_init__(self) -> None:
        require(self, w=(1, None), sinks=(0, None), block=(1, None))

    def reads(self, queries: Queries) -> Cost:
        first, sinks = _a_shape_blocks(queries, self.w, self.sinks, self.block)
        keys = queries.seen + (sinks - first).clamp(max=0) * self.block
        reach = self.w + 2 * (self.block - 1) + sinks * self.block
        return queries.cost(keys, reach=reach)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if keys.longest() <= self.w + self.sinks:
            return None
        grid = Grid.anchored(keys, self.block)
        return _static(grid, _a_shape(grid, self.w, self.sinks), keys)


@dataclass(frozen=True, kw_only=True)
class BlockStatic(AttentionMethod):
    """A fixed mask over blocks of queries and of keys: block-sparse FlashAttention (2205.14135).

    pattern: "butterfly", the one that paper takes (the flat block butterfly of 2112.00029): query block i
    reads key block j <= i where i and j differ in no bit or in one, below ``stride`` blocks where that is
    given; or "given", the causal part of ``mask`` [blocks, blocks] (bool, row i for query block i, both
    counted from position 0), which is passed from Python: BlockStatic(pattern="given", mask=...).

        butterfly      j   0 1 2 3 4 5 6 7
                     i 5   . x . . x x . .
                       6   . . x . x . x .
                       7   . . . x . x x x

    The query block's own key block is always read; besides, the blocks that hold the first ``sinks`` keys and
    the last w of any of its queries. Query blocks are counted as in a_shape. Decode is dense.
    """

    name: ClassVar[str] = "block_static"
    title: ClassVar[str] = "Static block masks (block-sparse FlashAttention)"
    paper: ClassVar[str] = "2205.14135"

    pattern: str = "butterfly"
    block: int = 128
    stride: int | None = None
    w: int = 1
    sinks: int = 0
    mask: Tensor | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, pattern=("butterfly", "given"), block=(1, None), w=(1, None), sinks=(0, None))
        require(self, stride=(2, None))
        if (self.pattern == "given") != (self.mask is not None):
            raise SpecError(
                "block_static takes a mask with pattern='given', and only there: "
                "BlockStatic(pattern='given', mask=...)."
            )
        square = self.mask is None or (self.mask.dim() == 2 and self.mask.shape[0] == self.mask.shape[1])
        if not square or (self.mask is not None and self.mask.dtype != torch.bool):
            assert self.mask is not None
            raise SpecError(
                "block_static takes a mask of as many query blocks as key blocks, bool; got "
                f"{list(self.mask.shape)} of {self.mask.dtype}."
            )

    def reads(self, queries: Queries) -> Cost:
        first, sinks = _a_shape_blocks(queries, self.w, self.sinks, self.block)
        between = self._between(queries, first, sinks)
        return queries.cost(queries.seen + ((sinks - first).clamp(max=0) + between) * self.block)

    def _between(self, queries: Queries, first: Tensor, sinks: int) -> Tensor:
        """[N]: blocks of the pattern from ``sinks`` on and below ``first`` [N], for each query."""
        row = (queries.seen - 1) // self.block
        if self.mask is not None:
            if queries.length > self.w + self.sinks:
                self._check_mask(-(-queries.length // self.block))
            below = pad(self.mask.cpu().long().cumsum(1), (1, 0))  # [blocks, blocks + 1]
            row, first = (x.clamp(max=len(self.mask)) for x in (row, first))
            row = row.clamp(max=len(self.mask) - 1)
            return (below[row, first] - below[row, min(sinks, len(self.mask))]).clamp(min=0)
        found, bit = torch.zeros_like(row), 1
        while bit < min(self.stride or 1 << 62, int(row.max()) + 1):
            other = row - bit
            found += ((row & bit) > 0) & (other >= sinks) & (other < first)
            bit *= 2
        return found

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if keys.longest() <= self.w + self.sinks:
            return None
        grid = Grid.anchored(keys, self.block)
        return _static(grid, self._rows(grid.first, grid) | _a_shape(grid, self.w, self.sinks), keys)

    def _rows(self, i: Tensor, grid: Grid) -> Tensor:
        """[Nq, Nk] bool: what the pattern's rows i [Nq] read."""
        j = grid.cols
        if self.mask is not None:
            self._check_mask(len(j))
            return self.mask.to(i.device)[i][:, : len(j)] & (j <= i[:, None])
        differ = i[:, None] ^ j
        one_bit = (differ & (differ - 1)) == 0
        near = differ < (self.stride or 1 << 62)
        return one_bit & near & (j <= i[:, None])

    def _check_mask(self, blocks: int) -> None:
        if self.mask is not None and blocks > len(self.mask):
            raise FarspanError(
                f"block_static was given a mask of {len(self.mask)} blocks of {self.block} tokens, which is "
                f"{len(self.mask) * self.block} tokens, for a sequence of more: pass a larger one."
            )


def _a_shape_blocks(queries: Queries, w: int, sinks: int, block: int) -> tuple[Tensor, int]:
    """For each query [N] the first of the blocks that hold its query block's last w keys, and how many
    blocks the sinks take."""
    begin = (queries.seen - 1) // block * block
    return (begin - (w - 1)).clamp(min=0) // block, -(-sinks // block)


def _a_shape(grid: Grid, w: int, sinks: int) -> Tensor:
    """[Nq, Nk] bool: the blocks of the first ``sinks`` keys and of the last w of any query of a block."""
    return grid.between(grid.local(w), grid.last) | (
        (grid.cols * grid.block_k < sinks) & (grid.cols <= grid.last[:, None])
    )


def _static(grid: Grid, read: Tensor, keys: Keys) -> BlockIndex:
    """The blocks in ``read`` [Nq, Nk], for every head alike."""
    blocks, counts = by_threshold(read.float(), 0.5)
    shape = keys.kv.shape[:2]
    return BlockIndex(
        blocks=blocks.int().expand(*shape, -1, -1).contiguous(),
        counts=counts.expand(*shape, -1).contiguous(),
        block_q=grid.block_q,
        block_k=grid.block_k,
        lead=keys.past % grid.block_q,
    )
