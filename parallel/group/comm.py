"""The ranks that share one sequence, and the collectives that farspan uses.

All data between ranks goes through ``Ranks``. It counts the bytes, and it turns the failure of another rank
into one FarspanError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Guard = Callable[[str], AbstractContextManager[None]]


def _unguarded(_: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Ranks:
    """One process group seen from one of its members.

    group: the torch.distributed process group.
    guard: called with the name of each collective before it runs; its context turns the failure of another
    rank into a FarspanError.
    sent: bytes that this rank has sent to others, by name of the collective.
    calls: how many collectives have run, by name.
    """

    group: dist.ProcessGroup
    guard: Guard = _unguarded
    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        self._global = dist.get_process_group_ranks(self.group)
        self._left = False

    def abort(self) -> None:
        """Cancel the collectives that have not finished. NCCL does this, gloo does not."""
        if not self._left:
            self.group.abort()

    def leave(self) -> None:
        """Destroy the group. Its connections close, so that a rank which waits for this one gets an error.
        ``guard`` refuses further collectives."""
        if not self._left:
            self.abort()
            self._left = True
            if dist.is_initialized():  # otherwise all groups are destroyed already
                dist.destroy_process_group(self.group)
            del self.group  # the last reference keeps connections open

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a copied cache is shared by the same ranks

    def global_rank(self, rank: int) -> int:
        """The rank in the whole job of this group's ``rank``."""
        return self._global[rank]

    @contextmanager
    def counted(self, name: str, sent: int) -> Iterator[None]:
        """The context of one collective: ``guard``, and ``sent`` bytes counted under its name."""
        with self.guard(name):
            self.calls[name] += 1
            self.sent[name] += sent
            yield

    def all_gather(self, x: Tensor, name: str = "all_gather") -> Tensor:
        """x, of the same shape on every rank -> [P, *x.shape]."""
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        with self.counted(name, (self.size - 1) * _bytes(x)):
            _all_gather(out.view(-1), x.view(-1), group=self.group)
        return out

    def reduce_scatter(self, x: Tensor, name: str = "reduce_scatter") -> Tensor:
        """x [P, ...] -> [...]: on rank r, the sum of x[r] over all ranks."""
        x = x.contiguous()
        out = x.new_empty(x.shape[1:])
        with self.counted(name, _bytes(x) // self.size * (self.size - 1)):
            _reduce_scatter(out.view(-1), x.view(-1), group=self.group)
        return out

    def all_to_all(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], name: str = "all_to_all"
    ) -> Tensor:
        """x [sum(send), ...]: the first send[0] entries go to rank 0 and so on -> [sum(receive), ...]."""
        x = x.contiguous()
        out = x.new_empty(sum(receive), *x.shape[1:])
        each = _bytes(x) // x.shape[0] if x.shape[0] else 0
        with self.counted(name, each * (sum(send) - send[self.rank])):
            dist.all_to_all_single(out, x, list(receive), list(send), group=self.group)
        return out

    def broadcast(self, x: Tensor, source: int, name: str = "broadcast") -> Tensor:
        """x of rank ``source``, on every rank."""
        x = x.contiguous()
        with self.counted(name, _bytes(x) * (self.size - 1) if self.rank == source else 0):
            dist.broadcast(x, group=self.group, group_src=source)
        return x

    def shift(self, x: Tensor, into: Tensor, by: int = 1, name: str = "shift") -> Shift:
        """Start to send x to the rank ``by`` places later, and to receive ``into`` (contiguous) from the rank
        ``by`` places earlier; the last rank is followed by the first.

        -> Shift: call ``wait()`` before ``into`` is read or x is changed.
        """
        x = x.contiguous()
        if self.size == 1:
            self.sent[name] += 0
            into.copy_(x)
            return Shift([], x, lambda: self.guard(name))
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        with self.counted(name, _bytes(x)):
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, x, group=self.group, group_peer=to),
                    dist.P2POp(dist.irecv, into, group=self.group, group_peer=source),
                ]
            )
        return Shift(works, x, lambda: self.guard(name))


@dataclass
class Shift:
    """A send and a receive that have been started."""

    _works: list[Any]
    _kept: Tensor  # its memory must not be freed before it has been sent
    _guard: Callable[[], AbstractContextManager[None]]

    def wait(self) -> None:
        """Wait until both have finished."""
        with self._guard():
            for work in self._works:
                work.wait()


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def pack(*tensors: Tensor) -> Tensor:
    """Tensors of any dtype as one flat uint8 buffer, so that they travel in one collective."""
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])


def unpack(buffer: Tensor, *like: Tensor) -> list[Tensor]:
    """The inverse of :func:`pack` along the last dimension: buffer [..., bytes] -> tensors [..., *shape]."""
    parts, at = [], 0
    for t in like:
        size = _bytes(t)
        raw = buffer[..., at : at + size].clone()  # a slice may begin where the dtype cannot
        parts.append(raw.view(t.dtype).view(*buffer.shape[:-1], *t.shape))
        at += size
    return parts
