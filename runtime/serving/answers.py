"""Answers of a patched model to the prompts of clients, one after another."""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...attention.errors import FarspanError
from ...parallel.group.mesh import Mesh
from .. import hf
from ..models import positions
from ..patched import Patched
from ..prefixes import PrefixStore
from .engine import Job, Refused
from .metrics import Metrics
from .reader import Call, Ending, Reader

_USUAL_LENGTH = 1024  # tokens of an answer for which the client sets no limit
_PIECE = 1 << 14  # characters
_END = "end"  # what rank 0 shares at last


@dataclass(kw_only=True)
class Prompt:
    """One request to the model.

    ids [1, T]: the tokens of the prompt. config: transformers' generation config; ``max_new_tokens`` is None
    where the client sets no limit. seed: for sampling; None: another one each time. began: when the request
    came, on the clock of ``time.monotonic``.
    reused: how many of the tokens were not read again; known once the answer begins.
    """

    ids: Tensor
    config: Any
    endpoint: str
    began: float
    seed: int | None = None
    reused: int = 0
    first: float | None = field(default=None, repr=False)  # when the first token came


class Answers:
    """A patched model and its tokenizer. It is used by one thread. Over ranks, rank 0 has the prompts, and
    the others ``follow``.

    prefixes: what keeps the caches of earlier prompts, over ranks this rank's part of them; None: every
    prompt is read whole. cuts: where a prompt can be cut, so that the cache of its beginning is reused.
    """

    def __init__(
        self, model: Any, tokenizer: Any, patched: Patched, metrics: Metrics, prefixes: PrefixStore | None
    ) -> None:
        self.model, self.tokenizer, self.patched = model, tokenizer, patched
        self.mesh: Mesh | None = patched.mesh
        self._metrics = metrics
        self._reader = Reader(model, tokenizer, patched, prefixes)
        self.cuts = self._reader.cuts
        self._limit = min((x for x in (positions(model), patched.room) if x is not None), default=None)
        self._job: Job | None = None
        if self.mesh is None:  # ranks end a call at the same token, and not in the middle of a prompt
            for module in hf.inspect_model(model).attention.values():
                module.register_forward_pre_hook(self._check_job)

    def check(self, prompt: Prompt) -> None:
        """Decide the length of an answer that the client leaves open. Raises Refused for a prompt without
        tokens, and for one that does not fit with its answer into the positions of the model, or of its
        caches where these have a fixed size."""
        length, new = prompt.ids.shape[1], prompt.config.max_new_tokens
        if length == 0:
            raise Refused(400, "The prompt has no tokens: give at least one word.")
        room = None if self._limit is None else self._limit - length
        if new is None:
            new = _USUAL_LENGTH if room is None else max(1, min(_USUAL_LENGTH, room))
            prompt.config.max_new_tokens = new
        if room is not None and new > room:
            raise Refused(
                400,
                f"The prompt has {length} tokens and its answer at most {new}, together more than the "
                f"{self._limit} positions that there are: shorten the prompt, or ask for fewer tokens.",
            )

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raises Refused for texts of which a prompt would be far too long, without reading more of them than
        shows it. Any thread may call it; others run between the pieces of a text."""
        if self._limit is None or sum(map(len, texts)) <= 2 * self._limit:
            return
        encode, length = self.tokenizer.backend_tokenizer.encode, 0
        for text in texts:
            for start in range(0, len(text), _PIECE):
                length += len(encode(text[start : start + _PIECE], add_special_tokens=False))
                if length > 2 * self._limit:  # fewer are counted exactly once they are one prompt
                    raise Refused(
                        400,
                        f"The prompt has more than {2 * self._limit} tokens, and there are {self._limit} "
                        "positions: shorten it.",
                    )

    def answer(self, prompt: Prompt, job: Job, streamer: Any) -> list[int]:
        """The tokens that the model writes after a prompt. streamer: ``put`` and ``end`` are called as those
        of transformers' streamers. Raises Cancelled where the job is cancelled meanwhile."""
        self._job = job
        seed = secrets.randbits(63) if prompt.seed is None else prompt.seed
        call = Call(prompt.ids, prompt.config, seed)
        try:
            if self.mesh is not None:
                shared(self.mesh, call)
            return self._answered(prompt, call, streamer)
        except FarspanError as error:
            if self.mesh is not None:  # a rank has failed, which is no fault of the request
                raise Refused(503, str(error)) from None
            raise
        finally:
            self._job = None
            self._metrics.read(self.patched.report())
            self.patched.reset_report()

    def idle(self) -> None:
        """Tell the other ranks, which would give up otherwise, that there is nothing to do."""
        if self.mesh is not None:
            shared(self.mesh, None)

    def end(self) -> None:
        """Let the other ranks end."""
        if self.mesh is not None:
            shared(self.mesh, _END)

    def _answered(self, prompt: Prompt, call: Call, streamer: Any) -> list[int]:
        tokens: list[int] = prompt.ids[0].tolist()
        taken = self._reader.taken(tokens)
        prompt.reused = taken.length
        self._metrics.prompt_tokens.inc(len(tokens))
        self._metrics.reused_tokens.inc(taken.length)
        if self._reader.keeps:
            (self._metrics.prefix_hits if taken.length else self._metrics.prefix_misses).inc()
        ids = self._reader.answer(call, taken, Ending(self._cancelled, streamer))
        return [int(token) for token in ids[0, len(tokens) :]]

    def _cancelled(self) -> bool:
        cancelled = self._job is not None and self._job.cancelled
        return cancelled if self.mesh is None else bool(shared(self.mesh, cancelled))

    def _check_job(self, *_: Any) -> None:
        if self._job is not None:
            self._job.check()


def follow(model: Any, tokenizer: Any, patched: Patched, prefixes: PrefixStore | None) -> None:
    """Make the calls of rank 0 until it ends. Raises FarspanError where a rank has failed."""
    mesh, reader = patched.mesh, Reader(model, tokenizer, patched, prefixes)
    assert mesh is not None
    while (call := shared(mesh)) != _END:
        if call is not None:
            call = replace(call, ids=call.ids.to(model.device))
            # An error of the model is the same on every rank, and rank 0 tells it. A rank that has failed
            # alone is missed in the next collective.
            with suppress(Exception):
                ending = Ending(lambda: bool(shared(mesh)))
                reader.answer(call, reader.taken(call.ids[0].tolist()), ending)


def shared(mesh: Mesh, value: Any = None) -> Any:
    """The value of rank 0, which has the clients, on every rank. Raises FarspanError where a rank has
    failed."""
    data = mesh.share(pickle.dumps(value) if mesh.rank == 0 else b"")
    return value if mesh.rank == 0 else pickle.loads(data)
