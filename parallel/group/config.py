"""ContextParallel: what a user decides about a sequence that is sharded over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...attention.errors import SpecError
from ...attention.whole import whole_number

MECHANISMS = ("auto", "gather", "ring", "ulysses", "usp", "pass_q")
BACKENDS = ("torch", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """How a sequence is spread over ranks.

    size: ranks that share one sequence; None: all of the job, or of the mesh. A job of a multiple of ``size``
        runs that many copies, ranks 0 .. size - 1 the first.
    mechanism: how prefill attention meets keys on other ranks: "auto" (the least bytes), "gather" (all-gather
        of keys and values), "ring", "ulysses" (heads instead of positions), "usp" (Ulysses inside, ring
        across) or "pass_q" (queries travel instead of keys).
    ulysses: degree of Ulysses inside USP, a divisor of ``size``; None: the ranks of one machine, or about the
        root of ``size`` where that is all of them or one.
    block: tokens; new tokens are stored in turn, in blocks of this many.
    timeout: seconds that a collective waits for a rank before all ranks stop.
    check: compare inputs and outputs over the ranks by hash, so that they cannot differ silently.
    backend: who runs Ulysses' all-to-all, "torch" or "deepspeed".
    mesh: a torch DeviceMesh (1-D, or with a dimension "cp" or "context"), an accelerate Accelerator or
        ParallelismConfig, or a process group to take the ranks from; None: the launcher's.
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
