"""What belongs to one request of a client while it is served."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ...serving.answers import Prompt
from ...serving.engine import Engine, Job


@dataclass(kw_only=True)
class Exchange:
    """One request. settings: those of its ``generation_config``. steered: whether it has such settings, or
    others that transformers checks when it generates. seed: for sampling. job, prompt: the work in the
    engine, once there is some. finished: whether the whole response has been sent. gone: whether the client
    has closed the connection before."""

    endpoint: str
    engine: Engine
    began: float = field(default_factory=time.monotonic)
    settings: Mapping[str, Any] = field(default_factory=dict)
    steered: bool = False
    seed: int | None = None
    job: Job | None = None
    prompt: Prompt | None = None
    finished: bool = False
    gone: bool = False

    def leave(self) -> None:
        """The client has gone: its work ends."""
        self.gone = True
        if self.job is not None:
            self.engine.cancel(self.job)


current: ContextVar[Exchange] = ContextVar("farspan_exchange")
"""The request that the present task serves; tasks that it starts inherit it."""
