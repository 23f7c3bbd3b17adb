"""What happens when a rank dies, stalls or fails: every rank stops, with one sentence that names it.

Each rank publishes a sign of life in the job's store twice a second, from a thread, together with the number
and name of the last collective it entered. Nothing else is stored while all is well. When a collective fails
on a rank, that rank looks the others up, finds out who is to blame and publishes a *verdict*; the first
verdict stands, and every rank raises it:

    rank 2 fails    -> publishes its reason as the verdict, then closes its connections
    rank 2 dies     -> the others' connections to it break, its signs of life stop
    rank 2 stalls   -> the others wait ``timeout`` seconds; its signs of life stop, or stay behind by number

NCCL: collectives return before they are done, so ``guard`` sees a failure at the next collective or
synchronisation only. A rank that finds a verdict aborts its NCCL groups, which ends kernels waiting for a
peer. Where a peer died without a word, NCCL's own watchdog ends the process after the same timeout
(TORCH_NCCL_ASYNC_ERROR_HANDLING, torch's default), naming the collective that did not finish.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from ...attention.errors import FarspanError
from .comm import Ranks
from .meeting import named, one_line, own

BEAT = 0.5  # seconds between two signs of life
GRACE = 2.0  # seconds in which a living rank shows one, on a busy machine too
LINGER = 1.0  # seconds the others have to read a verdict before this rank goes, perhaps with the store
ANSWER = 5.0  # seconds until the job's store counts as gone

_FROM_A_PEER = re.compile(r"gloo|nccl|timed? ?out|connection|socket|peer|broken pipe", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class _Life:
    """A rank's last sign of life."""

    beat: int
    count: int  # collectives entered
    name: str  # of the last one
    error: str | None  # what the rank has raised
    ended: bool


class Watch:
    """Watches over the ranks that have joined, those of other sequences too: they end with each other.

    store: the job's store; the watch uses a connection of its own.
    key: a prefix for the store's keys that no other watch has.
    ranks: the job's ranks watched over; ``beside``: those of them that share this one's sequence and so enter
    the same collectives; ``rank``: this one.
    timeout: seconds after which the groups' collectives give up, for the sentences.
    groups: the groups it guards. They are left when the watch ends, by a verdict or by ``close``.
    """

    def __init__(
        self, store: dist.Store, key: str, ranks: list[int], beside: list[int], rank: int, timeout: float
    ):
        self._store = own(store, GRACE)
        self._key, self._rank, self._timeout = key, rank, timeout
        self._others = [other for other in ranks if other != rank]
        self._beside = [other for other in beside if other != rank]
        self.groups: list[Ranks] = []
        self._count, self._name, self._beats = 0, "join", 0
        self._said: str | None = None  # an error of this rank's that the group survives
        self._verdict: str | None = None
        self._stopped = self._closed = False
        self._mute = False  # the store does not answer
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._publish()
        self._thread = threading.Thread(target=self._run, name="farspan watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # --- the main thread's side ---------------------------------------------------------------------------

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Around a collective: a failure in it that a peer has caused is raised as one FarspanError."""
        if self._verdict is not None:
            raise self._stop(self._verdict)
        if self._closed:
            raise FarspanError(f"{name} was called on a group of ranks that has been closed: patch again.")
        self._count += 1
        self._name = name
        try:
            yield
        except RuntimeError as error:
            if _out_of_memory(error) or not _FROM_A_PEER.search(str(error)):
                raise self.failing(error) from error
            raise self._stop(self._ask(self._judge, error) or self._without_store(error)) from error

    def failing(self, error: BaseException) -> FarspanError:
        """To be called when the model call of this rank raises: the others stop with its reason.

        -> the error to raise instead, with the sentence that all ranks say. A FarspanError is given back as
        it is and ends nothing: bad input is the same on every rank, and each of them says so itself. (Should
        the others have gone on, they name this rank and its error when they miss it.)
        """
        if self._verdict is not None:
            return self._stop(self._verdict)
        if isinstance(error, FarspanError):
            self._said = one_line(error)
            self._ask(self._publish)
            return error
        if _out_of_memory(error):
            text = (
                f"Rank {self._rank} ran out of memory ({one_line(error)}), so all ranks have stopped: more "
                "ranks, a smaller batch or a smaller prefill_chunk need less of it."
            )
        elif isinstance(error, KeyboardInterrupt):
            text = f"Rank {self._rank} was interrupted, so all ranks have stopped."
        else:
            what = f"{type(error).__name__}: {one_line(error)}"
            text = f"Rank {self._rank} failed, so all ranks have stopped: {what}"
            if isinstance(error, RuntimeError) and _FROM_A_PEER.search(str(error)):
                return self._stop(self._ask(self._judge, error, text) or text)  # tensor parallelism's, say
        return self._stop(self._ask(self._decide, text) or text)

    def close(self) -> None:
        """Leave the groups and stop watching; the others may see that this rank has ended."""
        if not self._closed:
            self._closed = True
            self._tasks.put(None)
            self._thread.join(BEAT)  # it may hang on a store whose keeper is stopped
            self._leave()
            atexit.unregister(self.close)

    def _leave(self) -> None:
        for group in self.groups:
            group.leave()

    def _stop(self, verdict: str) -> FarspanError:
        if not self._stopped:
            self._stopped, self._verdict = True, verdict
            self._leave()
            self._ask(self._linger)
        return FarspanError(verdict)

    def _ask(self, task: Callable[..., Any], *arguments: Any) -> Any:
        """What the watch's thread answers; None where the store has gone, or its keeper is stopped."""
        future: Future[Any] = Future()
        self._tasks.put((lambda: task(*arguments), future))
        until = time.monotonic() + ANSWER
        while not self._mute and self._thread.is_alive() and time.monotonic() < until:
            try:
                return future.result(0.1)
            except TimeoutError:
                continue
            except RuntimeError:
                break
        self._mute = True
        return None

    def _without_store(self, error: RuntimeError) -> str:
        at = self._place()
        if self._rank == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"Rank {self._rank} lost the job's store and its peers in {at}: {one_line(error)}"
        how = "stalled" if _timed_out(error) else "died or ended"
        return f"Rank 0 has {how}, and the job's store with it, while rank {self._rank} was in {at}."

    def _place(self) -> str:
        return f"{self._name} (collective {self._count})"

    # --- the thread's side: all traffic with the store ------------------------------------------------------

    def _run(self) -> None:
        while True:
            asked = None
            with suppress(Empty):
                asked = self._tasks.get(timeout=BEAT)
                if asked is None:
                    break
            if self._mute:
                return
            try:
                self._publish()
                if self._verdict is None and self._read_verdict() is not None:
                    for group in self.groups:
                        group.abort()
            except RuntimeError as error:  # the store has gone: no more to be said or heard
                if asked is not None:
                    asked[1].set_exception(error)
                return
            if asked is not None:
                _answer(*asked)
        with suppress(RuntimeError):
            self._publish(ended=True)

    def _publish(self, ended: bool = False) -> None:
        self._beats += 1
        life = [self._beats, self._count, self._name, self._said, ended]
        self._store.set(f"{self._key}/{self._rank}", json.dumps(life))

    def _lives(self) -> dict[int, _Life]:
        stored = self._store.multi_get([f"{self._key}/{rank}" for rank in self._others])
        return {rank: _Life(*json.loads(text)) for rank, text in zip(self._others, stored, strict=True)}

    def _read_verdict(self) -> str | None:
        if self._verdict is None and self._store.check([f"{self._key}/verdict"]):
            self._decide("")
        return self._verdict

    def _decide(self, text: str) -> str:
        """Publish a verdict, and take the one that stands."""
        self._verdict = self._store.compare_set(f"{self._key}/verdict", "", text).decode()
        self._store.add(f"{self._key}/seen", 1)
        return self._verdict

    def _linger(self) -> None:
        until = time.monotonic() + LINGER
        while time.monotonic() < until and self._store.add(f"{self._key}/seen", 0) <= len(self._others):
            time.sleep(0.05)

    def _judge(self, error: RuntimeError, otherwise: str | None = None) -> str:
        """Who is to blame for a collective that failed with ``error``.

        otherwise: what to say where all others live; None: the collective was a guarded one, and it is known
        who has entered it.
        """
        before = now = self._lives()
        until = time.monotonic() + GRACE
        silent = list(before)
        while silent and time.monotonic() < until:
            time.sleep(0.1 + len(before) / 1000)  # all ranks ask the one store
            self._publish()
            if (verdict := self._read_verdict()) is not None:
                return verdict
            now = self._lives()
            silent = [r for r, life in now.items() if life.beat == before[r].beat and not life.ended]
        return self._decide(self._blame(now, silent, error, otherwise))

    def _blame(
        self, lives: dict[int, _Life], silent: list[int], error: RuntimeError, otherwise: str | None
    ) -> str:
        at = self._place()
        least = min(lives[r].count for r in self._beside)
        behind = [r for r in self._beside if lives[r].count == least < self._count and otherwise is None]
        for rank in behind:
            if said := lives[rank].error:
                return f"Rank {rank} failed, so all ranks have stopped: {said}"
        if silent and _timed_out(error):
            return (
                f"{_have(silent, 'stalled')}: no sign of life, and {at} did not end within {self._timeout:g} "
                "s; the process is stopped or its machine cannot be reached."
            )
        if silent:
            return f"{_have(silent, 'died')} without a word while rank {self._rank} was in {at}."
        if ended := [r for r in (self._beside if otherwise is None else lives) if lives[r].ended]:
            return (
                f"{_have(ended, 'ended')} while rank {self._rank} was still in {at}; its own output says why."
            )
        if behind:
            last = lives[behind[0]]
            return (
                f"{_have(behind, 'stalled')}: alive, but not in {at} within {self._timeout:g} s; its last "
                f"was {last.name} (collective {last.count}). If it is only slow, give more time with "
                "ContextParallel(timeout=...)."
            )
        if otherwise is not None:
            return otherwise
        return f"Rank {self._rank} lost its connection to the others in {at}: {one_line(error)}"


def _answer(task: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(task())
    except BaseException as error:
        future.set_exception(error)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(
        isinstance(error, RuntimeError) and _MEMORY.search(str(error))
    )


def _timed_out(error: RuntimeError) -> bool:
    return bool(re.search(r"timed? ?out", str(error), re.IGNORECASE))


def _have(ranks: list[int], done: str) -> str:
    return f"{named(ranks).capitalize()} {'has' if len(ranks) == 1 else 'have'} {done}"
