"""ContextParallel: what a user decides about a sequence that is sharded over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...attention.checks import whole_number
from ...attention.errors import SpecError

MECHANISMS = ("auto", "gather", "ring", "ulysses", "usp", "pass_q")
BACKENDS = ("torch", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """How a sequence is sharded over ranks.

    size: ranks that share one sequence; None: all ranks of the job, or of the mesh. A job of n * ``size``
        ranks runs n sequences; ranks 0 .. size - 1 share the first one.
    mechanism: how the queries of a prefill reach keys on other ranks: "auto" (the least bytes), "gather"
        (all-gather of keys and values), "ring" (they pass round), "ulysses" (each rank has some heads of all
        positions), "usp" (Ulysses inside a group, a ring across groups) or "pass_q" (queries travel instead).
    ulysses: ranks of a Ulysses group in USP, a divisor of ``size``; None: the ranks of one machine. Where
        those are all ranks or a single one: the largest divisor of ``size`` up to its square root.
    block: tokens. ``generate`` stores new tokens on the ranks in turn, in blocks of this many.
    timeout: seconds that a collective waits for a rank before all ranks stop.
    check: compare the inputs and outputs of the ranks by hash, and raise an error where they differ.
    backend: the library that runs the all-to-all of Ulysses, "torch" or "deepspeed".
    mesh: which ranks take part: a torch DeviceMesh (1-D, or with a dimension "cp" or "context"), an
        accelerate Accelerator or ParallelismConfig, or a process group; None: those of the launcher.

    Raises SpecError for a value that is not allowed.
    """

    size: int | None = None
    mechanism: str = "auto"
    ulysses: int | None = None
    block: int = 64
    timeout: float = 30.0
    check: bool = True
    backend: str = "torch"
    mesh: Any = None

    def __post_init__(self) -> None:
        def wrong(name: str, allowed: str) -> SpecError:
            return SpecError(f"ContextParallel({name}={getattr(self, name)!r}): {allowed}.")

        for name in ("size", "ulysses", "block"):
            value = getattr(self, name)
            number = whole_number(value)
            if (number is None or number < 1) and (value is not None or name == "block"):
                or_none = "" if name == "block" else ", or None"
                raise wrong(name, f"a whole number of at least 1{or_none}, is allowed")
            object.__setattr__(self, name, number)
        if self.mechanism not in MECHANISMS:
            raise wrong("mechanism", f"one of {', '.join(MECHANISMS)} is allowed")
        if self.backend not in BACKENDS:
            raise wrong("backend", f"one of {', '.join(BACKENDS)} is allowed")
        if not isinstance(self.check, bool):
            raise wrong("check", "True or False is allowed")
        seconds = self.timeout
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise wrong("timeout", "a number of seconds above 0 is allowed")
        if self.ulysses is not None:
            if self.mechanism != "usp":
                raise wrong("ulysses", f'only mechanism="usp" has it, not {self.mechanism!r}')
            if self.size is not None and self.size % self.ulysses:
                raise wrong("ulysses", f"a divisor of size={self.size} is allowed")
