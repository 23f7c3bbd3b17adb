"""What happens when a rank dies, stalls or fails: every rank stops, with one sentence that names it.

Each rank writes a heartbeat to the job's store twice a second, from a thread: a count, with the number and
the name of the last collective that the rank has entered. Nothing else is stored while no rank fails. When a
collective fails on a rank, that rank reads the heartbeats of the others, finds the rank that caused it, and
publishes a sentence, the *verdict*. The first verdict counts, and every rank raises it:

    rank 2 fails    -> it publishes its error as the verdict, then closes its connections
    rank 2 dies     -> the connections of the others to it break, and its heartbeats end
    rank 2 stalls   -> the others wait ``timeout`` seconds; its heartbeats end or fall behind

NCCL: collectives return before they are done, so ``guard`` notices a failure only at the next collective or
synchronisation. A rank that finds a verdict aborts its NCCL groups, which ends kernels that wait for another
rank. Where a rank has died without a verdict, NCCL's watchdog ends the process after the same timeout
(TORCH_NCCL_ASYNC_ERROR_HANDLING, torch's default) and names the collective that did not finish.
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
from .meeting import named, one_line, own_connection

BEAT = 0.5  # seconds between two heartbeats
GRACE = 2.0  # seconds in which a living rank writes one, on a busy machine too
LINGER = 1.0  # seconds that the others have to read a verdict before this rank ends, perhaps with the store
ANSWER = 5.0  # seconds after which a store that does not answer counts as lost

_FROM_ANOTHER_RANK = re.compile(r"gloo|nccl|timed? ?out|connection|socket|peer|broken pipe", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class _Heartbeat:
    """The last heartbeat of a rank."""

    beat: int  # how many heartbeats so far
    count: int  # collectives entered
    name: str  # of the last collective
    error: str | None  # what the rank has raised
    ended: bool


class Watch:
    """Watches the ranks that have joined, those of other sequences too. When one fails, all of them end.

    store: the job's store; the watch opens a connection of its own.
    key: a prefix of the store's keys that no other watch uses.
    ranks: the ranks of the job that are watched. same_sequence: those of them that share this rank's
    sequence, and so enter the same collectives. rank: this one.
    timeout: seconds after which the collectives of the groups give up; it is part of the sentences.
    groups: the groups that are guarded. They are left when the watch ends, by a verdict or by ``close``.
    """

    def __init__(
        self,
        store: dist.Store,
        key: str,
        ranks: list[int],
        same_sequence: list[int],
        rank: int,
        timeout: float,
    ):
        self._store = own_connection(store, GRACE)
        self._key, self._rank, self._timeout = key, rank, timeout
        self._others = [other for other in ranks if other != rank]
        self._same_sequence = [other for other in same_sequence if other != rank]
        self.groups: list[Ranks] = []
        self._count, self._name, self._beats = 0, "join", 0
        self._raised: str | None = None  # an error of this rank after which the group goes on
        self._verdict: str | None = None
        self._stopped = self._closed = False
        self._store_lost = False  # it does not answer
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._publish()
        self._thread = threading.Thread(target=self._run, name="farspan watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # --- called by the main thread ------------------------------------------------------------------------

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """The context of a collective. A failure that another rank has caused is raised as one
        FarspanError."""
        if self._verdict is not None:
            raise self._stop(self._verdict)
        if self._closed:
            raise FarspanError(f"{name} was called on a group of ranks that has been closed; patch again.")
        self._count += 1
        self._name = name
        try:
            yield
        except RuntimeError as error:
            if _out_of_memory(error) or not _FROM_ANOTHER_RANK.search(str(error)):
                raise self.failing(error) from error
            raise self._stop(
                self._in_thread(self._find_verdict, error) or self._without_store(error)
            ) from error

    def failing(self, error: BaseException) -> FarspanError:
        """Stop the other ranks with the reason of ``error``, which this rank's call of the model has raised.

        -> the error to raise instead, with the sentence that all ranks raise. A FarspanError is returned as
        it is and stops no rank: bad input is the same on every rank, and each of them raises its own error.
        (Where the others have gone on, they name this rank and its error when their collective fails.)
        """
        if self._verdict is not None:
            return self._stop(self._verdict)
        if isinstance(error, FarspanError):
            self._raised = one_line(error)
            self._in_thread(self._publish)
            return error
        if _out_of_memory(error):
            text = (
                f"Rank {self._rank} ran out of memory ({one_line(error)}), so all ranks have stopped: more "
                "ranks, a smaller batch or a smaller prefill_chunk need less memory."
            )
        elif isinstance(error, KeyboardInterrupt):
            text = f"Rank {self._rank} was interrupted, so all ranks have stopped."
        else:
            what = f"{type(error).__name__}: {one_line(error)}"
            text = f"Rank {self._rank} failed, so all ranks have stopped: {what}"
            if isinstance(error, RuntimeError) and _FROM_ANOTHER_RANK.search(str(error)):
                # such as one of tensor parallelism
                return self._stop(self._in_thread(self._find_verdict, error, text) or text)
        return self._stop(self._in_thread(self._decide, text) or text)

    def close(self) -> None:
        """Leave the groups and stop watching. The heartbeat tells the others that this rank has ended."""
        if not self._closed:
            self._closed = True
            self._tasks.put(None)
            self._thread.join(BEAT)  # it may wait for a store whose process is stopped
            self._leave()
            atexit.unregister(self.close)

    def _leave(self) -> None:
        for group in self.groups:
            group.leave()

    def _stop(self, verdict: str) -> FarspanError:
        if not self._stopped:
            self._stopped, self._verdict = True, verdict
            self._leave()
            self._in_thread(self._linger)
        return FarspanError(verdict)

    def _in_thread(self, task: Callable[..., Any], *arguments: Any) -> Any:
        """The result of ``task``, run by the watch's thread; None where the store does not answer."""
        future: Future[Any] = Future()
        self._tasks.put((lambda: task(*arguments), future))
        until = time.monotonic() + ANSWER
        while not self._store_lost and self._thread.is_alive() and time.monotonic() < until:
            try:
                return future.result(0.1)
            except TimeoutError:
                continue
            except RuntimeError:
                break
        self._store_lost = True
        return None

    def _without_store(self, error: RuntimeError) -> str:
        at = self._place()
        if self._rank == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"Rank {self._rank} lost the job's store and its peers in {at}: {one_line(error)}"
        how = "stalled" if _timed_out(error) else "died or ended"
        return f"Rank 0 has {how}, and the job's store with it, while rank {self._rank} was in {at}."

    def _place(self) -> str:
        return f"{self._name} (collective {self._count})"

    # --- run by the watch's thread: all traffic with the store ----------------------------------------------

    def _run(self) -> None:
        while True:
            request = None
            with suppress(Empty):
                request = self._tasks.get(timeout=BEAT)
                if request is None:
                    break
            if self._store_lost:
                return
            try:
                self._publish()
                if self._verdict is None and self._read_verdict() is not None:
                    for group in self.groups:
                        group.abort()
            except RuntimeError as error:  # the store is lost, and with it all heartbeats
                if request is not None:
                    request[1].set_exception(error)
                return
            if request is not None:
                _run_task(*request)
        with suppress(RuntimeError):
            self._publish(ended=True)

    def _publish(self, ended: bool = False) -> None:
        self._beats += 1
        heartbeat = [self._beats, self._count, self._name, self._raised, ended]
        self._store.set(f"{self._key}/{self._rank}", json.dumps(heartbeat))

    def _heartbeats(self) -> dict[int, _Heartbeat]:
        stored = self._store.multi_get([f"{self._key}/{rank}" for rank in self._others])
        return {rank: _Heartbeat(*json.loads(text)) for rank, text in zip(self._others, stored, strict=True)}

    def _read_verdict(self) -> str | None:
        if self._verdict is None and self._store.check([f"{self._key}/verdict"]):
            self._decide("")
        return self._verdict

    def _decide(self, text: str) -> str:
        """Publish a verdict. -> the one that counts, which is the first."""
        self._verdict = self._store.compare_set(f"{self._key}/verdict", "", text).decode()
        self._store.add(f"{self._key}/seen", 1)
        return self._verdict

    def _linger(self) -> None:
        until = time.monotonic() + LINGER
        while time.monotonic() < until and self._store.add(f"{self._key}/seen", 0) <= len(self._others):
            time.sleep(0.05)

    def _find_verdict(self, error: RuntimeError, otherwise: str | None = None) -> str:
        """The verdict on a collective that failed with ``error``.

        otherwise: the sentence where all other ranks are alive. None: the collective was guarded, so the
        heartbeats tell which ranks have entered it.
        """
        before = now = self._heartbeats()
        until = time.monotonic() + GRACE
        silent = list(before)
        while silent and time.monotonic() < until:
            time.sleep(0.1 + len(before) / 1000)  # all ranks read the same store
            self._publish()
            if (verdict := self._read_verdict()) is not None:
                return verdict
            now = self._heartbeats()
            silent = [r for r, last in now.items() if last.beat == before[r].beat and not last.ended]
        return self._decide(self._sentence(now, silent, error, otherwise))

    def _sentence(
        self, heartbeats: dict[int, _Heartbeat], silent: list[int], error: RuntimeError, otherwise: str | None
    ) -> str:
        at = self._place()
        least = min(heartbeats[r].count for r in self._same_sequence)
        behind = [
            r for r in self._same_sequence if heartbeats[r].count == least < self._count and otherwise is None
        ]
        for rank in behind:
            if raised := heartbeats[rank].error:
                return f"Rank {rank} failed, so all ranks have stopped: {raised}"
        if silent and _timed_out(error):
            return (
                f"{_have(silent, 'stalled')}: no heartbeat, and {at} did not end within {self._timeout:g} "
                "s; the process is stopped, or its machine cannot be reached."
            )
        if silent:
            return f"{_have(silent, 'died')} without a word while rank {self._rank} was in {at}."
        if ended := [
            r for r in (self._same_sequence if otherwise is None else heartbeats) if heartbeats[r].ended
        ]:
            return (
                f"{_have(ended, 'ended')} while rank {self._rank} was still in {at}; its own output says why."
            )
        if behind:
            last = heartbeats[behind[0]]
            return (
                f"{_have(behind, 'stalled')}: alive, but not in {at} within {self._timeout:g} s; its last "
                f"was {last.name} (collective {last.count}). If it is only slow, give more time with "
                "ContextParallel(timeout=...)."
            )
        if otherwise is not None:
            return otherwise
        return f"Rank {self._rank} lost its connection to the others in {at}: {one_line(error)}"


def _run_task(task: Callable[[], Any], future: Future[Any]) -> None:
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
