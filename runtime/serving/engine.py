"""The engine of a server: one thread that loads a model and then runs one request after another."""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ...attention.errors import FarspanError

logger = logging.getLogger("farspan")

_RETRY_LOADING = 5  # seconds after which a client may ask again while the model is loaded
_SMOOTH = 0.2  # weight of the newest request in the mean of their seconds


class Refused(Exception):
    """A request that is not answered: the HTTP status, one sentence, and the seconds after which the client
    may try again (None: the same request would be refused again)."""

    def __init__(self, status: int, sentence: str, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after = status, sentence, retry_after


class Cancelled(Exception):
    """Raised inside a request whose client has gone."""


class Job:
    """A request in the engine. ``run`` is called in the engine's thread, and ``done(result, error)`` there or
    in the thread that cancels it, exactly once."""

    def __init__(self, run: Callable[[Job], Any], done: Callable[[Any, Exception | None], None]) -> None:
        self.run, self.done = run, done
        self.cancelled = False

    def check(self) -> None:
        """Raises Cancelled once the request has been cancelled."""
        if self.cancelled:
            raise Cancelled


class Engine:
    """One thread for all calls of a model, because captured CUDA graphs belong to a thread. At most ``limit``
    requests wait; a further one is refused with 429. While the model is loaded, and after a fault of the
    device or of a rank, every request is refused with 503.

    idle: called every ``period`` seconds in which no request runs. end: called at the end of the thread.
    """

    def __init__(self, limit: int, *, period: float = 5.0) -> None:
        self.limit, self._period = limit, period
        self.idle: Callable[[], None] | None = None
        self.end: Callable[[], None] | None = None
        self.ready = False
        self.fault: str | None = None  # why no request can be answered any more
        self.running: Job | None = None
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0  # mean of the last requests
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def start(
        self, load: Callable[[], None], ready: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        """Start the thread, which calls ``load`` and then serves.

        ready: called when requests are served. failed: called with an error of ``load`` or ``idle``; then
        nothing can be served."""
        self._thread = threading.Thread(
            target=self._serve, args=(load, ready, failed), name="farspan engine", daemon=True
        )
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Let a job run when those before it are done. Raises Refused where it cannot."""
        with self._changed:
            self.check()
            if len(self._waiting) >= self.limit:
                raise Refused(
                    429,
                    f"The queue is full: {len(self._waiting)} requests are waiting. Try again later.",
                    max(1, math.ceil(self._seconds)),
                )
            self._waiting.append(job)
            self._changed.notify()
        return job

    def check(self) -> None:
        """Raises Refused unless requests can be answered."""
        if self.fault is not None:
            raise Refused(503, self.fault)
        if self._stopping:
            raise Refused(503, "The server is stopping.")
        if not self.ready:
            raise Refused(503, "The model is being loaded. Try again in some seconds.", _RETRY_LOADING)

    def cancel(self, job: Job) -> None:
        """Drop a job that waits, or let the running one end at its next token."""
        with self._changed:
            job.cancelled = True
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
        if waits:
            job.done(None, Cancelled())

    def stop(self, within: float = 10.0) -> None:
        """Cancel all jobs and end the thread, for which it waits at most so many seconds."""
        with self._changed:
            self._stopping = True
            jobs = [*self._waiting, *([self.running] if self.running else [])]
            self._changed.notify()
        for job in jobs:
            self.cancel(job)
        if self._thread is not None:
            self._thread.join(within)

    def _serve(
        self, load: Callable[[], None], ready: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        try:
            load()
        except Exception as error:
            self.fault = f"The model could not be loaded: {error}"
            failed(error)
            return
        self.ready = True
        ready()
        while (job := self._next(failed)) is not None:
            self._run(job)
            self.running = job = None
        if self.end is not None and self.fault is None:
            self._guarded(self.end)

    def _next(self, failed: Callable[[Exception], None]) -> Job | None:
        """The next job; None when the engine stops. failed: called with an error of ``idle``."""
        while True:
            with self._changed:
                if not self._waiting and not self._stopping:
                    self._changed.wait(self._period)
                if self._waiting:
                    self.running = self._waiting.popleft()
                    return self.running
                if self._stopping:
                    return None
            if self.idle is not None and self.fault is None:
                try:
                    self.idle()
                except FarspanError as error:  # a rank has failed
                    self.fault = str(error)
                    failed(error)

    def _run(self, job: Job) -> None:
        began = time.monotonic()
        result, error = self._guarded(lambda: job.run(job))
        if error is None:
            self._seconds += _SMOOTH * (time.monotonic() - began - self._seconds)
        job.done(result, error)

    def _guarded(self, call: Callable[[], Any]) -> tuple[Any, Exception | None]:
        """(the result of a call, its error). A fault of the device or of a rank is kept in ``fault``."""
        try:
            return call(), None
        except Cancelled:
            return None, Cancelled()  # a new one, without the traceback that would keep the cache alive
        except Refused as error:
            return None, error
        except torch.OutOfMemoryError:
            gc.collect()
            return None, Refused(503, "The device has no memory left for this request; shorten it.", 1)
        except FarspanError as error:
            return None, Refused(400, str(error))
        except Exception as error:
            logger.error("A request has failed.", exc_info=True)
            sentence = f"The model has failed ({said(error)})."
            if _is_fault(error):
                self.fault = f"{sentence} Restart the server."
                return None, Refused(503, self.fault)
            return None, Refused(500, sentence)


def said(error: Exception) -> str:
    """An error on one line: its class, and the beginning of its text."""
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_fault(error: Exception) -> bool:
    """Whether a device cannot be used any more."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
