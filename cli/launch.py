"""A command that a launcher (torchrun, accelerate, deepspeed) has started on several ranks.

All of them run the command. Rank 0 reads stdin, prints and writes; what several have to say, one of them
says. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import typer

from ..attention.errors import FarspanError

T = TypeVar("T")

_MEETING = 300.0  # seconds that ranks wait for one that started late, or for a person who types
_ASKING = 10.0  # seconds in which the job's store answers, if it can
_LETTING = 1.0  # seconds that a rank which ends lets others speak: its end may be theirs


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


def on_rank_0(what: str, make: Callable[[], T]) -> T:
    """What `make` gives on rank 0 (JSON-able), on every rank; where it raises a FarspanError, so do all."""
    if size() == 1:
        return make()
    key = _key(what)
    if leads():
        value: Any = None
        error: FarspanError | None = None
        try:
            value = make()
        except FarspanError as raised:
            error = raised
        _store(_MEETING).set(key, json.dumps([value, error and str(error)]))
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]
    try:
        value, sentence = json.loads(_store(_MEETING).get(key))
    except RuntimeError as lost:
        raise FarspanError(f"Rank 0 has ended, or did not give {what} within {_MEETING:g} s.") from lost
    if sentence is not None:
        raise FarspanError(sentence)
    return value  # type: ignore[no-any-return]


def say_once(sentence: str, say: Callable[[str], None]) -> None:
    """Say what this rank ends with, unless another one has said the same."""
    if size() == 1:
        return say(sentence)
    from ..parallel.digest import text_hash

    key = _key(f"said/{text_hash(sentence):x}")
    try:
        store = _store(_ASKING)
        if store.add(key, 1) == 1:
            say(sentence)
        until = time.monotonic() + _LETTING
        while store.add(key, 0) < size() and time.monotonic() < until:
            time.sleep(0.05)
    except (RuntimeError, ValueError):  # nobody to ask: better said twice than not at all
        say(sentence)


def _key(name: str) -> str:
    return f"farspan/command/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


@cache
def _store(seconds: float) -> Any:
    """The job's store, where torch.distributed's ranks find each other."""
    import torch.distributed as dist

    return next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))[0]
