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
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import NoneType
from typing import Any

from ..attention.errors import FarspanError
from ..runtime.hf import stored_bytes
from . import batch as forward
from .energy import energy
from .memory import peak
from .perplexity import cut_windows
from .ranks import Job
from .results import ROW, Replica, Results, open_results, plan, record
from .run import Summary, finished_if_stopped
from .sample import Sample, encode, score
from .setup import Setup
from .shape import MAYBE_NUMBER, NUMBER
from .shared import check_methods, common_settings, evaluating, meter, patched_with, start
from .speed_tables import speed_table

UNPATCHED, DENSE = "unpatched", "dense"
_PREFILL, _DECODE = "prefill_seconds", "decode_tokens_per_second"
_HIGHEST = (
    "peak_memory_bytes",
    "kv_bytes_stored",
    "kv_bytes_on_device",
    "kv_bytes_read_per_token",
    "prefill_sent_bytes",
    "decode_sent_bytes_per_token",
)
_ENERGY = ("prefill_joules", "decode_joules_per_token")
TIMING: dict[str, Any] = {
    **ROW,
    "length": int,
    "prefill_seconds": NUMBER,
    "decode_tokens_per_second": NUMBER,
    "session": (int, NoneType),
    **dict.fromkeys(("prefill_density", "decode_density", "score", *_HIGHEST), MAYBE_NUMBER),
}
"""The fields that the summary needs in a row."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of one length as token ids, and the samples that they were made from, if any."""

    ids: list[list[int]]
    asked: Sequence[Sample] = ()

    def recipe(self, repeat: int) -> dict[str, Any]:
        """The recipe of a row: the number of the repeat, and a hash of the prompts."""
        digest = hashlib.sha256(repr(self.ids).encode()).hexdigest()[:16]
        return {"repeat": repeat, "prompts_sha256": digest}


def speed(
    setup: Setup,
    text: str | Mapping[int, Sequence[Sample]],
    *,
    lengths: Sequence[int] = (1024, 4096),
    new_tokens: int = 64,
    repeats: int = 3,
    batch_size: int = 1,
) -> Summary:
    """Time every method at every prompt length: prefill of all prompt tokens but one, then `new_tokens` by
    `generate`.

    text: prose that the prompts are cut from, or `batch_size` samples for each length, whose answers are then
    scored as well. Decoding is a plain `model.generate` that may not stop early. Peak memory (bytes) is that
    of the process, weights included: on CUDA what torch has allocated, elsewhere the resident set. The KV
    cache is measured after the last token, spare room included, and what a decode step reads of it with what
    it reads to select. Joules are those of the device, where it counts them. Over ranks each is the highest
    of the ranks, and so are the bytes that a rank sends. Writes and resumes a folder as `run`
    does: what was measured stays, what is missing is measured, with the baseline anew beside it.
    Raises FarspanError for sizes that are too small.
    """
    if min(lengths, default=0) < 2 or min(new_tokens, repeats, batch_size) < 1:
        raise FarspanError(
            f"lengths {list(lengths)}, new_tokens {new_tokens}, repeats {repeats}, batch_size {batch_size}: "
            "lengths must be at least 2 and the others at least 1."
        )
    model, tokenizer = setup.model, setup.tokenizer
    with Job(model, setup.parallel, setup.storage) as job:
        specs = check_methods(model, setup.methods, setup.recipe, job)
        sizes = sorted(set(lengths))
        prompts = {n: _prompts(tokenizer, text, n, batch_size) for n in sizes}
        timer = Timer(model=model, tokenizer=tokenizer, recipe=setup.recipe, job=job)
        settings = {
            **setup.config,
            **common_settings(model, tokenizer, setup.name, specs, setup.recipe, setup.storage),
            "suite": "speed",
            "baseline": timer.baseline,
            "lengths": sizes,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "batch_size": batch_size,
            "ranks": job.size,
        }
        session = forward.set_aside(model)
        with (
            open_results(job, setup.out, settings, session=session, row=TIMING) as results,
            evaluating(model),
        ):
            keys = [_key(length, repeat) for repeat in range(repeats) for length in sizes]
            plan(job, results, dict.fromkeys([timer.baseline, *specs], keys))
            with finished_if_stopped(results, _finish):
                _measure(timer, prompts, specs, results, new_tokens, repeats, setup.progress)
            return _finish(results)


def _prompts(
    tokenizer: Any, text: str | Mapping[int, Sequence[Sample]], length: int, batch_size: int
) -> Prompts:
    if isinstance(text, str):
        return Prompts(ids=list(cut_windows(tokenizer, text, length, batch_size)))
    return Prompts(ids=[encode(tokenizer, sample) for sample in text[length]], asked=text[length])


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
    session = len(results.config["sessions"])
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
    short = Prompts(ids=[row[:64] for row in prompts[min(prompts)].ids])
    with meter(progress, sum(len({timer.baseline, *waiting}) for *_, waiting in rounds)) as advance:
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
        ranks = job.gather([most.bytes, *stored_bytes(cache), sent[1] - sent[0], sent[2] - sent[1]])
        memory, stored, on_device, prefill_sent, decode_sent = map(_highest, zip(*ranks, strict=True))
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


def _highest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _finish(results: Results) -> Summary:
    """Write summary.json and the table from the folder's rows (on the first rank)."""
    data = summarise(results.config, results.rows)
    data["unfinished"] = results.unfinished()
    data["complete"] = not data["unfinished"]
    if not isinstance(results, Replica):
        results.write_summary(data)
        title = f"# speed: {data['model']} ({data['dtype']})"
        results.write_text("speed.md", f"{title}\n\n{speed_table(data)}")
    return Summary(out=results.out, data=data, complete=data["complete"], files=["speed.md"])


def summarise(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over repeats per (method, length), and ratios to the baseline of the same sessions.

    A ratio above 1 is faster; it is None if those sessions have no baseline. Cells without rows are left out.
    """
    baseline = config.get("baseline", UNPATCHED)
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["length"], row["method"]), []).append(row)
    overall = [
        {
            "method": method,
            "length": length,
            **_cell(cells[length, method], cells.get((length, baseline), [])),
        }
        for length in sorted(config["lengths"])
        for method in dict.fromkeys([baseline, *config["methods"]])
        if (length, method) in cells
    ]
    named = ("suite", "model", "dtype", "versions", "baseline", "new_tokens", "batch_size", "ranks")
    sessions = len({row.get("session") for row in rows})
    return {**{name: config.get(name) for name in named}, "sessions": sessions, "overall": overall}


def _cell(rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "repeats": len(rows),
        **{name: median(row[name] for row in rows) for name in (_PREFILL, _DECODE)},
        **{f"{name}_range": _range(rows, name) for name in (_PREFILL, _DECODE)},
        "prefill_speedup": _ratio(baseline, rows, _PREFILL),
        "decode_speedup": _ratio(rows, baseline, _DECODE),
        **{name: rows[0].get(name) for name in ("prefill_density", "decode_density", "score")},
        **{name: _highest([row.get(name) for row in rows]) for name in _HIGHEST},
        **{name: _median([row.get(name) for row in rows]) for name in _ENERGY},
    }


def _range(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The lowest and the highest value, over all sessions."""
    values = [row[name] for row in rows]
    return [min(values), max(values)]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ratio(above: Sequence[Mapping[str, Any]], below: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The median over sessions of the ratio of medians within a session, weighted by its number of rows."""
    ratios = []
    for session in {row.get("session") for row in (*above, *below)}:
        values = [[row[name] for row in rows if row.get("session") == session] for rows in (above, below)]
        if all(values):
            ratios += [median(values[0]) / median(values[1])] * min(map(len, values))
    return median(ratios) if ratios else None
