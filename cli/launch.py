"""A command that a launcher (torchrun, accelerate, deepspeed) has started on several ranks.

All ranks run the command. Rank 0 reads stdin, prints and writes. An error that several ranks have is printed
by one of them. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from ..attention.errors import FarspanError

T = TypeVar("T")

_MEETING = 300.0  # seconds that ranks wait for a rank that started late, or for someone who types at rank 0
_STORE = 10.0  # seconds in which the job's store must answer
_QUOTED = 80  # characters of an option's value that are quoted
SECRET = frozenset({"api_key"})  # options that no sentence may quote; rank 0 alone uses them
_GRACE = 1.0  # seconds before a failed rank exits, as launchers then stop the ranks that have not printed yet


def size() -> int:
    """How many ranks the launcher has started; 1 without one."""
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) if number.isdecimal() else 1


def leads() -> bool:
    """Whether this rank reads stdin, prints and writes: rank 0, or the only process."""
    return size() == 1 or os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """The number of this rank on its machine, from 0."""
    number = os.environ.get("LOCAL_RANK", "0")
    return int(number) if number.isdecimal() else 0


def only_rank_0() -> None:
    """End the command on all ranks but rank 0, which does the work alone."""
    if not leads():
        raise typer.Exit()


def on_rank_0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result (JSON-able) on every rank.

    A FarspanError that it raises is raised on every rank. Raises FarspanError where the ranks do not meet.
    """
    if size() == 1:
        return make()
    value: Any = None
    error: FarspanError | None = None
    if leads():
        try:
            value = make()
        except FarspanError as raised:
            error = raised
    everyone = _meet("farspan/command", [value, error and str(error)])
    if error is not None:
        raise error
    value, sentence = everyone[0]
    if sentence is not None:
        raise FarspanError(sentence)
    return value  # type: ignore[no-any-return]


class SpreadCommand(TyperCommand):
    """A command that a launcher's ranks run together, each with the same options."""

    def invoke(self, context: Any) -> Any:
        """Run the command. Raises FarspanError, before anything is loaded, where options differ between
        ranks."""
        same_options(context)
        return super().invoke(context)


def same_options(context: typer.Context) -> None:
    """Check that all ranks run the same command with the same options, defaults included.

    Of ``--device`` only the kind is compared, because each rank may name its own device; keys are not. Raises
    FarspanError, which names each option that differs, and the ranks whose value is not that of the majority
    (of rank 0, if there is no majority)."""
    if size() == 1:
        return
    from ..parallel.group.digest import minority
    from ..parallel.group.meeting import named

    spelt = {param.name: max(param.opts, key=len) for param in context.command.params}
    given = {"the command": context.command_path}
    given |= {
        spelt.get(name, name): _as_text(name, value)
        for name, value in context.params.items()
        if name not in SECRET
    }
    said = _meet("farspan/options", given)
    if minority([rank["the command"] for rank in said]):
        said = [{"the command": rank["the command"]} for rank in said]
    faults = []
    for name in said[0]:
        values = [rank[name] for rank in said]
        if odd := minority(values):
            others = next(value for i, value in enumerate(values) if i not in odd)
            faults += [f"{name} is {values[odd[0]]} on {named(odd)} and {others} on the others"]
    if faults:
        of = f" of {context.command_path}" if len(said[0]) > 1 else ""
        raise FarspanError(
            f"The ranks were given different options{of}: {'; '.join(faults)}. Start every rank with the "
            "same command."
        )


def _as_text(name: str, value: Any) -> str:
    """An option's value as text for a sentence: a long one is cut, with a hash of the whole behind it."""
    from ..parallel.group.digest import text_hash

    if name == "device":
        value = value.partition(":")[0]
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}... ({text_hash(text):x})"


def say_once(sentence: str, say: Callable[[str], None]) -> None:
    """Print (by `say`) the sentence that this rank ends with, unless another rank has printed the same
    one."""
    if size() == 1:
        return say(sentence)
    from ..parallel.group.digest import text_hash

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store over restarts
    key = f"farspan/said/{attempt}/{text_hash(sentence):x}"
    try:
        store, _, _ = _rendezvous(_STORE)
        if store.add(key, 1) == 1:
            say(sentence)
        until = time.monotonic() + _GRACE
        while store.add(key, 0) < size() and time.monotonic() < until:
            time.sleep(0.05)
    except (RuntimeError, ValueError):  # without the store: printing twice is better than not at all
        say(sentence)


def wait_for_rank_0() -> None:
    """Wait until rank 0 has printed. Launchers stop all ranks when the first one exits with an error."""
    time.sleep(_GRACE)


def leave() -> None:
    """Leave the process group after a successful command; NCCL warns about a group that is not left."""
    if size() > 1 and "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(key: str, says: Any) -> list[Any]:
    """The values `says` (JSON) of all ranks, by rank. Raises FarspanError where the ranks do not meet."""
    from ..parallel.group.meeting import meet

    try:
        store, rank, count = _rendezvous(_MEETING)
    except (RuntimeError, ValueError) as lost:
        raise FarspanError(f"This rank did not meet the others of the job: {lost}") from lost
    _, everyone = meet(store, key, list(range(count)), rank, says, _MEETING)
    return [everyone[other] for other in range(count)]


@cache
def _rendezvous(seconds: float) -> tuple[Any, int, int]:
    """The job's store (where ranks of torch.distributed find each other), this rank, and the number of
    ranks."""
    import torch.distributed as dist

    return next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))
