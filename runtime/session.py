"""What the layers of one patched model share during a call, and what marks a patch as one model's own."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from torch import Tensor

from ..attention.errors import FarspanError
from ..parallel.group.mesh import Mesh
from ..parallel.mechanisms.call import Call
from .cache import KVStore
from .inputs import Given
from .padding import Padding, read_padding


class Stores(Protocol):
    """The stores of the running call, by layer."""

    def __getitem__(self, index: int) -> KVStore | None: ...


class Unique:
    """A part of a patch, which belongs to one model. Copying or pickling it raises FarspanError."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise FarspanError(
            "A patched model cannot be copied or pickled (torch.save of a whole model pickles it): call "
            "remove() first, and patch again afterwards. save_pretrained and state_dict work while it is "
            "patched."
        )


class Notices(Counter[str]):
    """What was not done in calls of a patched model, and why, by number of calls. warned: the reasons that a
    warning was given of."""

    def __init__(self) -> None:
        super().__init__()
        self.warned: set[str] = set()


class Session(threading.local):
    """What the layers of one patched model share during a forward call; threads may call it at the same
    time."""

    def __init__(self, strict: bool, mesh: Mesh | None = None, notices: Notices | None = None) -> None:
        self.strict = strict
        self.mesh = mesh
        self.notices = Notices() if notices is None else notices  # of all threads, for the report
        self.call: Call | None = None  # of a mesh, while the decoder runs
        self.output: Tensor | None = None  # of a mesh, what the last call has given
        self.logits_to_keep: int | None = None  # how many last positions the caller wants; None: all
        self.scoring = False  # whether logits of more than the last position are wanted
        self.off = False  # whether the running call is the model's own, since it was set to another attention
        self.positions: Tensor | None = None  # of the whole call, while a part of it runs
        self.given: Given | None = None  # of the running attention module, where needed
        self.rotary_calls: dict[tuple[int, str], Any] = {}  # last calls of rotary embeddings
        self.cached = False  # whether the running call keeps its keys
        self.stores: Stores | None = None
        self.ends: list[int] | None = None  # where rows of the running call end, if some have padding behind
        self._padding: tuple[int, Padding] | None = None  # of the running call, and up to which position
        self._paddings: dict[int, tuple[Tensor, Padding]] = {}  # by mask id: each kind of layer has its mask
        self._noticed: set[str] = set()  # in the running call

    def begin_call(self, stores: Stores | None, padding: Padding, total: int) -> None:
        """A call begins that takes the sequence to ``total`` positions, and keeps its keys in ``stores``."""
        self.end_call()
        self.cached, self.stores, self.ends = stores is not None, stores, padding.ends
        self._padding = total, padding

    def notice(self, reason: str, warning: str | None = None) -> None:
        """Take into the report, once for each call, what was not done in it; ``warning`` is given once for
        each patch, by the first of several ranks."""
        if reason in self._noticed:
            return
        self._noticed.add(reason)
        self.notices[reason] += 1
        first = self.mesh is None or self.mesh.rank == 0
        if warning is not None and first and reason not in self.notices.warned:
            self.notices.warned.add(reason)
            warnings.warn(warning, stacklevel=3)

    def ends_below(self, total: int) -> list[int] | None:
        """Where rows end among the first ``total`` positions; None where no padding follows them."""
        if self.ends is None or min(self.ends) >= total:
            return None
        return [min(end, total) for end in self.ends]

    def padding(self, mask: Tensor | None, batch: int, length: int) -> Padding:
        """Read a 2-D mask [B, Tk], True where a token is. Worked out once for all the layers that are given
        it."""
        if mask is None:
            return Padding()
        if mask.dim() != 2:
            raise FarspanError(f"farspan takes a 2-D attention mask for padding; got a {mask.dim()}-D one.")
        if self._padding is not None and mask.shape == (batch, self._padding[0]) and length == mask.shape[1]:
            return self._padding[1]
        if id(mask) not in self._paddings:
            self._paddings[id(mask)] = mask, read_padding(mask)
        if mask.shape != (batch, length):
            raise FarspanError(
                f"The attention mask covers {list(mask.shape)} (rows, positions), the keys are "
                f"{[batch, length]}: pass a mask "
                "with one entry for every token, cached ones included."
            )
        return self._paddings[id(mask)][1]

    @contextmanager
    def part_of(self, positions: Tensor) -> Iterator[None]:
        """Around calls that run parts of one with these ``positions``; a part may have parts itself."""
        before = self.positions
        self.positions = positions if before is None else before
        try:
            yield
        finally:
            self.positions = before

    def end_call(self) -> None:
        """Forget the call."""
        self.cached, self.stores, self.ends = False, None, None
        self._padding, self._paddings, self._noticed = None, {}, set()
