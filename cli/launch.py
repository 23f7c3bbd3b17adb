"""A command that a launcher (torchrun, accelerate, deepspeed) has started on several ranks.

All of them run the command. Rank 0 reads stdin, prints and writes; what the ranks have to say in common, one
of them says. Nothing here imports torch before it is needed.
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

_MEETING = 300.0  # seconds that ranks wait for one that started late, or that reads what a person types
_ASKING = 10.0  # seconds in which the job's store answers, where it can
_LETTING = 1.0  # seconds before a rank with nothing to say ends: launchers then end those that are saying it


def size() -> int:
    """How many ranks the launcher has started; 1 without one."""
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) if number.isdecimal() else 1


def leads() -> bool:
    """Whether this rank reads, prints and writes."""
    return size() == 1 or os.environ.get("RANK", "0") == "0"


def only_rank_0() -> None:
    """End here on the other ranks: the command does its work on one."""
    if not leads():
        raise typer.Exit()


def on_rank_0(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0 (JSON-able), on every rank; where it raises a FarspanError, so do all."""
    if size() == 1:
        return make()
    key = f"farspan/rank_0/{next(_counter())}"
    if not leads():
        try:
            value, sentence = json.loads(_store(_MEETING).get(key))
        except RuntimeError as error:
            raise FarspanError(f"Rank 0 has not begun within {_MEETING:g} s, or has ended.") from error
        if sentence is not None:
            raise FarspanError(sentence)
        return value  # type: ignore[no-any-return]
    try:
        value = make()
    except FarspanError as error:
        _store(_MEETING).set(key, json.dumps([None, str(error)]))
        raise
    _store(_MEETING).set(key, json.dumps([value, None]))
    return value


def is_mine_to_say(sentence: str) -> bool:
    """Whether this rank is the first to end with that sentence; the others leave it to say so."""
    if size() == 1:
        return True
    from ..parallel.digest import text_hash

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"farspan/said/{attempt}/{text_hash(sentence):x}"
    try:
        store = _store(_ASKING)
        first = store.add(key, 1) == 1
        until = time.monotonic() + _LETTING
        while not first and time.monotonic() < until:
            time.sleep(0.05)
        ...
    except (RuntimeError, ValueError):  # no store any more: better said twice than not at all
        return True
    return first
