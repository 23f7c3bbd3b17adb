"""The Session: what the layers of one patched model share during a call. Unique: a base for parts of a
patch."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ..attention.errors import FarspanError
from ..parallel.group.comm import Ranks
from ..parallel.group.mesh import Mesh
from ..parallel.mechanisms.call import Call
from .inputs import Given
from .padding import Padding, checked_2d, read_padding
from .static_call import StaticCall
from .store.store import KVStore

_thread = threading.local()


def in_call() -> bool:
    """Whether the decoder of a patched model runs in this thread."""
    return getattr(_thread, "running", False)


class Stores(Protocol):
    """The stores of the present call by layer."""

    def __getitem__(self, index: int) -> KVStore | None: ...


class Unique:
    """A base class for parts of a patch, which belong to one model. Copying or pickling one raises
    FarspanError."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise FarspanError(
            "A patched model cannot be copied or pickled (torch.save of a whole model pickles it): call "
            "remove() first, and patch again afterwards. save_pretrained and state_dict work while it is "
            "patched."
        )


class Notices(Counter[str]):
    """For each notice (what a call did not do, and why), the number of calls. warned: the notices for which a
    warning was given."""

    def __init__(self) -> None:
        super().__init__()
        self.warned: set[str] = set()


class Session(threading.local):
    """What the layers of one patched model share during a forward call. Each thread has its own values, so
    several threads may call the model at the same time."""

    def __init__(self, strict: bool, mesh: Mesh | None = None, notices: Notices | None = None) -> None:
        self.strict = strict
        self.mesh = mesh
        self.notices = Notices() if notices is None else notices  # for the report; shared by all threads
        self.call: Call | None = None  # the call over ranks, while the decoder runs
        self.output: Tensor | None = None  # over ranks, the last position of the last call's hidden states
        self.logits_to_keep: int | None = None  # number of last positions with logits; None: all positions
        self.scoring = False  # whether the call returns logits of more than the last position
        self.off = False  # whether the model was set to another attention, so that farspan does nothing
        self.positions: Tensor | None = None  # the positions of the whole call, while a part of it runs
        # the inputs of the present attention module, where a method needs them
        self.given: Given | None = None
        # by layer, the hidden states that later layers need in this call; None outside a call
        self.early: dict[int, Tensor] | None = None
        self.rotary_calls: dict[tuple[int, str], Any] = {}  # the last calls of rotary embeddings
        self.cached = False  # whether the call keeps its keys in a cache
        self.stores: Stores | None = None
        self.step: StaticCall | None = None  # the call, where stores of fixed size serve it by fused steps
        self.ends: list[int] | None = None  # where rows end; None without padding on the right
        self._padding: tuple[int, Padding] | None = None  # (number of positions, their padding) of the call
        self._paddings: dict[int, tuple[Tensor, Padding]] = {}  # by mask id: kinds of layers have own masks
        self._noticed: set[str] = set()  # the notices of the present call

    def begin_call(self, stores: Stores | None, padding: Padding, total: int) -> None:
        """Begin a call that extends the sequence to ``total`` positions and keeps its keys in ``stores``."""
        self.end_call()
        _thread.running = True
        self.cached, self.stores, self.ends = stores is not None, stores, padding.ends
        self.early = {}
        self._padding = total, padding

    def notice(self, reason: str, warning: str | None = None) -> None:
        """Count ``reason`` in the report, once for each call. ``warning`` is given once for each patch, over
        ranks by rank 0 only."""
        if reason in self._noticed:
            return
        self._noticed.add(reason)
        self.notices[reason] += 1
        first = self.mesh is None or self.mesh.rank == 0
        if warning is not None and first and reason not in self.notices.warned:
            self.notices.warned.add(reason)
            warnings.warn(warning, stacklevel=3)

    def ends_below(self, total: int) -> list[int] | None:
        """The positions at which rows end among the first ``total`` positions; None where none of these is
        padding on the right."""
        if self.ends is None or min(self.ends) >= total:
            return None
        return [min(end, total) for end in self.ends]

    def padding(self, mask: Tensor | None, batch: int, length: int) -> Padding:
        """The padding of a 2-D mask [B, Tk], which is True at tokens. It is computed once for all layers that
        are called with the same mask."""
        if mask is None:
            return Padding()
        mask = checked_2d(mask)
        if self._padding is not None and mask.shape == (batch, self._padding[0]) and length == mask.shape[1]:
            return self._padding[1]
        if id(mask) not in self._paddings:
            self._paddings[id(mask)] = mask, read_padding(mask)
        if mask.shape != (batch, length):
            raise FarspanError(
                f"The attention mask has the shape {list(mask.shape)} (rows, positions), and the keys have "
                f"{[batch, length]}: pass a mask with one entry for every token, including cached tokens."
            )
        return self._paddings[id(mask)][1]

    @property
    def ranks(self) -> Ranks:
        """The ranks of a patch that has some."""
        assert self.mesh is not None
        return self.mesh.ranks

    def token_mask(self, call: Call, hidden: Tensor) -> Tensor | None:
        """For a call over ranks: [B, T] bool for all tokens of the call, False at padding; None where no
        token is padding. hidden [B, any, any]: hidden states, for the batch and the device."""
        ends = self.ends_below(call.total)
        begun = call.starts is None or max(call.starts) <= call.past
        if begun and ends is None:
            return None
        at = torch.arange(call.past, call.total, device=hidden.device).expand(hidden.shape[0], -1)
        real = torch.ones_like(at, dtype=torch.bool) if call.start is None else at >= call.start[:, None]
        return real if ends is None else real & (at < torch.tensor(ends, device=at.device)[:, None])

    @contextmanager
    def part_of(self, positions: Tensor) -> Iterator[None]:
        """A context in which the parts of one call run. positions: those of the whole call. It may be nested:
        a part may run in parts."""
        before = self.positions
        self.positions = positions if before is None else before
        try:
            yield
        finally:
            self.positions = before

    def end_call(self) -> None:
        """End the call and drop its values."""
        _thread.running = False
        self.cached, self.stores, self.ends, self.early = False, None, None, None
        self.step = None
        self._padding, self._paddings, self._noticed = None, {}, set()
