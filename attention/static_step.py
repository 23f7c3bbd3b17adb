"""One decode step of one new token on a store whose buffers never move.

The length of the sequence is on the device, and operations read it there, so that the step is the same
sequence of kernels for every token: it can be captured in a CUDA graph. A method names its step by
``static_step``; what may differ from token to token is only which step that is, and the host knows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from .kv import KV
from .lists import TokenLists
from .ops.append import append
from .ops.decode import decode
from .ops.gather_decode import gather_decode
from .partial import Partial
from .softmax import Softmax
from .summary import Summary


class StaticKeys(Protocol):
    """The keys of one layer in a store of fixed size, at a step of one new token.

    buffers: [B, Hkv, N], of which the first ``length`` - 1 positions are filled. new: [B, Hkv, 1], the key
    and value of the new token, which the step stores. length: [1] int32, on the device, with the new token.
    start: [B], on the device, the first position of each row; None where no row is padded. impl: which
    implementation of operations runs.
    """

    @property
    def impl(self) -> str: ...

    @property
    def buffers(self) -> KV: ...

    @property
    def new(self) -> KV: ...

    @property
    def length(self) -> Tensor: ...

    @property
    def start(self) -> Tensor | None: ...

    @property
    def state(self) -> dict[str, Tensor]:
        """What the method keeps of the rows over time; empty where it has nothing, or not of all rows alike.
        Its tensors on the device stay where they are from step to step."""
        ...

    def seen(self) -> list[int]:
        """How many keys the new token of each row sees, on the host."""
        ...

    def entries(self, summary: Summary) -> Tensor:
        """The buffer of a summary's entries [B, Hkv, room, width]; those of the earlier tokens are in it."""
        ...

    def position(self) -> int:
        """The position of the new token, on the host."""
        ...

    def set_number(self, name: str, value: int) -> None:
        """Set a number that is on the device; it is written only where it changes."""
        ...

    def number(self, name: str) -> Tensor:
        """The number of this name, [1] int32 on the device."""
        ...


@dataclass(frozen=True, kw_only=True)
class StaticStep:
    """The fused step of a method: store the new token, choose keys, attend.

    name: what a captured graph is kept by; steps of one method and one name launch the same kernels.
    every: whether it is dense attention. scores_keys: whether it reads all raw keys to select.
    """

    name: ClassVar[str]
    every: ClassVar[bool] = False
    scores_keys: ClassVar[bool] = False

    @property
    def summary(self) -> Summary | None:
        """The summary by which it selects, which it extends by the new token; None: it needs none."""
        return None

    def lists(self, num_heads: int, num_kv_heads: int) -> int:
        """How many heads have a list of keys of their own."""
        return num_kv_heads

    def begin(self, keys: StaticKeys) -> None:
        """Called once a step, on the host, outside of what is captured."""

    def run(self, q: Tensor, keys: StaticKeys, softmax: Softmax) -> Partial:
        """Store the new key and value, and attend with q [B, H, 1, D]. It may be captured, so it waits for
        nothing on a GPU and depends on no number of the host that changes from token to token."""
        raise NotImplementedError

    def read(self, seen: int) -> int:
        """How many keys a query that sees ``seen`` of them reads, for the report."""
        return seen


@dataclass(frozen=True, kw_only=True)
class EveryKeyStep(StaticStep):
    """Dense attention."""

    name: ClassVar[str] = "every"
    every: ClassVar[bool] = True

    def run(self, q: Tensor, keys: StaticKeys, softmax: Softmax) -> Partial:
        store(keys)
        return decode(q, keys.buffers, softmax, start=keys.start, length=keys.length, impl=keys.impl)


def store(keys: StaticKeys, **beside: Any) -> None:
    """Store the new token, and in the same launch what is kept ``beside`` it, as ``ops.append`` takes it."""
    new = keys.new
    append(new.k, new.v, keys.buffers, keys.length, start=keys.start, impl=keys.impl, **beside)


def attend_listed(q: Tensor, keys: StaticKeys, lists: TokenLists, softmax: Softmax) -> Partial:
    """Attention of q [B, H, 1, D] over the keys in ``lists``."""
    return gather_decode(q, keys.buffers, lists, softmax, check=False, impl=keys.impl)
