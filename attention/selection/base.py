"""The base of every kind of selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..keys import Keys
from ..partial import Partial


class Tally(NamedTuple):
    """A number of pairs that only the device knows: the sum of ``counts``, which is not large, times
    ``each``."""

    counts: Tensor
    each: int


Pairs = int | Tally


class Selection(ABC):
    """Which keys each query of a call reads, and all that can be done with that.

    A kind serves prefill where it overrides ``run_prefill`` and ``needed``, and decode where it overrides
    ``run_decode`` and ``run_decode_here``. Pairs are (query head, key) pairs, summed over the batch. Every
    method below takes the keys [B, Hkv, Tk, D] of the whole call and its queries q [B, H, Tq, D], the last Tq
    of the Tk positions.
    """

    called: ClassVar[str]  # its name in a sentence, with the article: "a Window"
    dense: ClassVar[bool] = False  # whether it is dense attention: every visible key, weighed as ever
    _kinds: ClassVar[list[type[Selection]]] = []

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        Selection._kinds.append(cls)

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        """Attention of all queries of a prefill call over the selected keys, and the pairs read by the
        queries ``rows`` of the call. ``impl`` is the implementation of the operations."""
        raise refusal("prefill", self)

    def run_decode(self, q: Tensor, keys: Keys, impl: str) -> tuple[Partial, Pairs]:
        """Attention of the queries of a decode call over the selected keys, and the pairs read."""
        raise refusal("decode", self)

    def run_decode_here(self, q: Tensor, keys: Keys) -> tuple[Partial, Pairs]:
        """Attention of a decode call over those of the selected keys that this rank holds, and the pairs read
        here. ``keys.kv`` has the keys and values held, ``keys.places()`` their positions, and
        ``keys.held(n)`` says how many of the first n positions they include. Where one device holds every
        key, this is ``run_decode``."""
        raise refusal("decode", self)

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        """The keys that the queries at positions ``chunk`` = [begin, end) of a prefill call read, as [B, Hkv,
        end] bool. ``starts`` are the first valid positions of the B rows."""
        raise refusal("prefill", self)

    @abstractmethod
    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        """The pairs read, as a mask [B, 1 | Hkv | H, Tq, Tk] bool; causality and padding included.

        start [B] is the first valid position of each row (None: no row is padded), batch is B; a kind that
        carries them itself uses its own. rows [R]: only these queries of the call, [B, 1 | Hkv | H, R, Tk],
        and nothing larger is made.
        """

    def entries_read(self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1) -> Tensor:
        """[B, Tq] int64 on the CPU: how many entries that are no keys of the sequence each query reads
        besides the keys of ``to_mask``; every head reads as many."""
        return torch.zeros(batch, tq, dtype=torch.long)

    @property
    def mask_heads(self) -> int:
        """The number of heads of ``to_mask``."""
        return 1

    @property
    def reads_every_key(self) -> bool:
        """Whether it reads every visible key, whatever their weights."""
        return self.dense

    def loads_shared_by(self, num_heads: int, num_kv_heads: int) -> int:
        """How many query heads of a decode query share one load of a key."""
        return num_heads // num_kv_heads

    @classmethod
    def serves(cls, phase: str) -> bool:
        """Whether it runs in ``phase``, "prefill" or "decode"."""
        name = f"run_{phase}"
        return getattr(cls, name) is not getattr(Selection, name)


Index = Selection | None  # what select_prefill and select_decode answer; None is every visible key


def refusal(phase: str, answer: object) -> TypeError:
    """The error for an answer of ``select_<phase>`` that cannot run in that phase."""
    able = sorted({kind.called for kind in Selection._kinds if kind.serves(phase)})
    able.sort(key=lambda called: called != "None")
    return TypeError(
        f"select_{phase} answers with {', '.join(able[:-1])} or {able[-1]}; got {type(answer).__name__}."
    )


def total(counts: Tensor, each: int) -> Pairs:
    """The sum of ``counts`` times ``each``. Off the CPU the counts are not read, because that would wait for
    the device."""
    return int(counts.sum()) * each if counts.device.type == "cpu" else Tally(counts, each)
