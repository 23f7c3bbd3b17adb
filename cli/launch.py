"""A command that a launcher (torchrun, accelerate, deepspeed) has started on several ranks.

All of them run the command. Rank 0 reads stdin, prints and writes; what several have to say, one of them
says. Nothing here imports torch before it is needed.
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

_MEETING = 300.0  # seconds that ranks wait for one that started late, or for a person who types
_ASKING = 10.0  # seconds in which the job's store answers, if it can
_LONGEST = 80  # characters of an option's value that are quoted
_LETTING = 1.0  # seconds that a rank which ends leaves the others to speak: its end may be theirs


def size() -> int:
    """How many ranks the launcher has started; 1 without one."""
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) if number.isdecimal() else 1


def leads() -> bool:
    """Whether this rank reads, prints and writes."""
    return size() == 1 or os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """This rank's place on its machine."""
    number = os.environ.get("LOCAL_RANK", "0")
    return int(number) if number.isdecimal() else 0


def only_rank_0() -> None:
    """The other ranks end here: the command does its work on one."""
    if not leads():
        raise typer.Exit()


def on_rank_0(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0 (JSON-able), on every rank; a FarspanError there is raised on all.

    Raises FarspanError where the ranks do not meet.
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
    """A command that a launcher's ranks run together: every one of its options is the same on all ranks."""

    def invoke(self, context: Any) -> Any:
        """Raises FarspanError, before anything is loaded, where the ranks were given different options."""
        same_options(context)
        return super().invoke(context)


def same_options(context: typer.Context) -> None:
    """That all ranks run the same command with the same options, defaults included; of ``--device`` the kind,
    as a rank may name the device of its own. Raises FarspanError that says which option differs, and on which
    ranks from the majority (from rank 0's, if there is none)."""
    if size() == 1:
        return
    from ..parallel.group.digest import minority
    from ..parallel.group.meeting import named

    spelt = {param.name: max(param.opts, key=len) for param in context.command.params}
    given = {"the command": context.command_path}
    given |= {spelt.get(name, name): _as_text(name, value) for name, value in context.params.items()}
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
    """An option's value, fit for a sentence; a long one by its beginning and a hash of the whole."""
    from ..parallel.group.digest import text_hash

    if name == "device":
        value = value.partition(":")[0]
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({text_hash(text):x})"


def say_once(sentence: str, say: Callable[[str], None]) -> None:
    """Say what this rank ends with, unless another one has said the same."""
    if size() == 1:
        return say(sentence)
    from ..parallel.group.digest import text_hash

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # of torchrun, whose store stays
    key = f"farspan/said/{attempt}/{text_hash(sentence):x}"
    try:
        store, _, _ = _rendezvous(_ASKING)
        if store.add(key, 1) == 1:
            say(sentence)
        until = time.monotonic() + _LETTING
        while store.add(key, 0) < size() and time.monotonic() < until:
            time.sleep(0.05)
    except (RuntimeError, ValueError):  # nobody to ask: better said twice than not at all
        say(sentence)


def let_rank_0_speak() -> None:
    """To be called by a rank that ends in silence with an error: launchers end all ranks with the first."""
    time.sleep(_LETTING)


def leave() -> None:
    """Leave the job that this command has joined, once all is well: NCCL warns where nobody does."""
    if size() > 1 and "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(key: str, says: Any) -> list[Any]:
    """What each rank says (JSON), by rank. Raises FarspanError where the ranks do not meet."""
    from ..parallel.group.meeting import meet

    try:
        store, rank, count = _rendezvous(_MEETING)
    except (RuntimeError, ValueError) as lost:
        raise FarspanError(f"This rank did not meet the others of the job: {lost}") from lost
    _, everyone = meet(store, key, list(range(count)), rank, says, _MEETING)
    return [everyone[other] for other in range(count)]


@cache
def _rendezvous(seconds: float) -> tuple[Any, int, int]:
    """The job's store, where torch.distributed's ranks find each other, this one's number, and how many."""
    import torch.distributed as dist

    return next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))
