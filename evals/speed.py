"""Prefill seconds and decode tokens per second, each method beside a baseline in one run.

On one device the baseline is the unpatched model. Over ranks it is dense attention over the same ranks: the
unpatched model would run whole on each of them, and a prompt that is worth spreading does not fit there. What
spreading itself gains is the ratio of two runs' numbers, one with a launcher and one without.

Repeats are interleaved (baseline, each method, then again), so a machine that slows down slows all alike;
medians are reported, and ratios to the baseline are what can be compared between machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from ..attention.errors import FarspanError
from . import batch as forward
from .memory import peak
from .perplexity import cut_windows
from .ranks import Job
from .report import markdown, share_read
from .results import open_results, record
from .run import Summary
from .sample import Sample, encode, score
from .shared import check_methods, evaluating, meter, patched_with, recipes, start

UNPATCHED, DENSE = "unpatched", "dense"
_HIGHEST = ("peak_memory_bytes", "prefill_sent_bytes", "decode_sent_bytes_per_token")


def speed(
    model: Any,
    tokenizer: Any,
    text: str | Mapping[int, Sequence[Sample]],
    methods: Sequence[str],
    out: str | Path,
    *,
    model_name: str,
    config: Mapping[str, Any],
    lengths: Sequence[int] = (1024, 4096),
    new_tokens: int = 64,
    repeats: int = 3,
    batch_size: int = 1,
    recipe: str | Path | None = None,
    parallel: Any = None,
    progress: bool = True,
) -> Summary:
    """Time every method at every prompt length: all prompt tokens but one in prefill, `new_tokens` by
    `generate`.

    text: prose that the prompts are cut from, or for each length `batch_size` samples, whose answers are
    scored as well. Decoding goes through a plain `model.generate` that may not stop early. Peak memory is a
    process's (a rank's, the highest of them), weights included: on CUDA what torch has allocated, else the
    resident set. Over ranks (`parallel`) the bytes that a rank sends come along, the highest of them. Writes
    a folder like the other evaluations', but is never resumed: times of two runs are not one measurement.
    """
    if min(lengths, default=0) < 2 or min(new_tokens, repeats, batch_size) < 1:
        raise FarspanError(
            f"lengths {list(lengths)}, new_tokens {new_tokens}, repeats {repeats}, batch_size {batch_size}: "
            "lengths must be at least 2 and the others at least 1."
        )
    with Job(model, parallel) as job:
        specs = check_methods(model, methods, recipe, job)
        pad = forward.pad_token(model, tokenizer)
        sizes = sorted(set(lengths))
        samples = {} if isinstance(text, str) else text
        if isinstance(text, str):
            prompts = {size: list(cut_windows(tokenizer, text, size, batch_size)) for size in sizes}
        else:
            prompts = {size: [encode(tokenizer, sample) for sample in text[size]] for size in sizes}
        baseline = UNPATCHED if job.mesh is None else DENSE
        settings = {
            **config,
            "suite": "speed",
            "model": model_name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "baseline": baseline,
            "methods": specs,
            "recipes": recipes(specs, recipe),
            "lengths": sizes,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "batch_size": batch_size,
            "ranks": job.size,
        }

        def once(
            spec: str, prompt: list[list[int]], count: int, asked: Sequence[Sample] = ()
        ) -> dict[str, Any]:
            batch = forward.collate(prompt, pad, model.device)
            unpatched = spec == UNPATCHED
            with (
                peak(model.device) as most,
                nullcontext() if unpatched else patched_with(model, spec, recipe, job) as patched,
            ):
                sent = [job.sent]
                started = start(model, batch, patched, job)
                sent.append(job.sent)
                if patched:
                    patched.reset_report()
                with forward.timed(model.device) as clock:
                    answers = forward.greedy(
                        model, batch, started.take(), max_new_tokens=count, pad=pad, eos=()
                    )
                sent.append(job.sent)
                read = job.report(patched).summary if patched else {}
            ranks = job.gather([most.bytes, sent[1] - sent[0], sent[2] - sent[1]])
            memory, prefill_sent, decode_sent = map(_highest, zip(*ranks, strict=True))
            return {
                "score": _mean_score(tokenizer, asked, answers),
                "prefill_seconds": started.seconds,
                "decode_tokens_per_second": len(prompt) * count / clock.seconds,
                "prefill_density": started.summary.get("prefill_density"),
                "decode_density": read.get("decode_density"),
                "implementation": read.get("implementation"),
                "peak_memory_bytes": memory,
                "prefill_sent_bytes": prefill_sent,
                "decode_sent_bytes_per_token": decode_sent / count,
            }

        everyone = list(dict.fromkeys([baseline, *specs]))
        session = forward.set_aside(model)
        with open_results(job, out, settings, session=session) as results, evaluating(model):
            if results.rows:
                raise FarspanError(
                    f"{out} holds a speed run already; times are measured in one run: give another --out."
                )
            with meter(progress, repeats * len(prompts) * len(everyone)) as advance:
                for spec in everyone:  # warm up: allocators, thread pools, compiled kernels
                    once(spec, [row[:64] for row in prompts[min(prompts)]], 2)
                for repeat in range(repeats):
                    for length, prompt in prompts.items():
                        for spec in everyone:
                            place = {
                                "key": f"speed/{length}/{repeat}",
                                "method": spec,
                                "recipe": {"repeat": repeat},
                            }
                            found = once(spec, prompt, new_tokens, samples.get(length, ()))
                            record(job, results, [{**place, "length": length, **found}])
                            advance(1, f"{length} · {spec}")
            data = summarise(results.config, results.rows)
            if job.first:
                results.write_summary(data)
                title = f"# speed: {model_name} ({data['dtype']})"
                results.write_text("speed.md", f"{title}\n\n{speed_table(data)}")
            return Summary(out=results.out, data=data, complete=True, files=["speed.md"])


def _mean_score(tokenizer: Any, samples: Sequence[Sample], answers: Sequence[list[int]]) -> float | None:
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    scores = [score(sample, text) for sample, text in zip(samples, texts, strict=False)]
    return sum(scores) / len(scores) if scores else None


def _highest(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def summarise(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over repeats per (method, length), and ratios to the baseline (above 1 is faster)."""
    overall = []
    baseline = config.get("baseline", UNPATCHED)
    for length in config["lengths"]:
        base: dict[str, float] = {}
        for method in dict.fromkeys([baseline, *config["methods"]]):
            mine = [row for row in rows if row["length"] == length and row["method"] == method]
            found = {
                name: median(row[name] for row in mine)
                for name in ("prefill_seconds", "decode_tokens_per_second")
            }
            base = base or found
            overall.append(
                {
                    "method": method,
                    "length": length,
                    "repeats": len(mine),
                    **found,
                    "prefill_speedup": base["prefill_seconds"] / found["prefill_seconds"],
                    "decode_speedup": found["decode_tokens_per_second"] / base["decode_tokens_per_second"],
                    **{name: mine[0].get(name) for name in ("prefill_density", "decode_density", "score")},
                    **{name: _highest([row.get(name) for row in mine]) for name in _HIGHEST},
                }
            )
    named = ("suite", "model", "dtype", "versions", "baseline", "new_tokens", "batch_size", "ranks")
    return {**{name: config.get(name) for name in named}, "complete": True, "overall": overall}


def speed_table(data: Mapping[str, Any]) -> str:
    """Markdown: a row per method and length."""
    head = [f"× {data['baseline']}" if name == "×" else name for name in _head(data)]
    body = [[f"`{cells[0]}`", *cells[1:]] for cells in _cells(data)]
    return f"{markdown(head, body)}\n{_caption(data)}\n"


def terminal_table(data: Mapping[str, Any]) -> Any:
    """A rich Table of the same rows."""
    from rich.table import Table

    table = Table(title=f"speed · {data['model']}", caption=_caption(data))
    for name in _head(data):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for cells in _cells(data):
        table.add_row(*cells)
    return table


def _caption(data: Mapping[str, Any]) -> str:
    alone, baseline = data["ranks"] == 1, data["baseline"]
    beside = f"the {baseline} model" if alone else f"{baseline} over the same {data['ranks']} ranks"
    parts = [
        f"× = faster than {beside} by this factor",
        "prefill: the time to the first token, but for one step",
        "read: share of keys read in prefill / decode",
        *(["found: right answers"] if _scored(data) else []),
        f"memory: {'the process' if alone else 'a rank'} at its peak, weights included",
        *([] if alone else ["sent: what a rank sends in prefill / per token"]),
    ]
    return f"{'; '.join(parts)}."


def _scored(data: Mapping[str, Any]) -> bool:
    return data["overall"][0].get("score") is not None


def _head(data: Mapping[str, Any]) -> list[str]:
    head = ["method", "length", "prefill s", "×", "tokens/s", "×", "read %"]
    head += ["found"] if _scored(data) else []
    return [*head, "memory", *(["sent"] if data["ranks"] > 1 else [])]


def _cells(data: Mapping[str, Any]) -> list[list[str]]:
    """Rows of either table, under `_head`."""
    rows = []
    for row in data["overall"]:
        cells = [
            row["method"],
            str(row["length"]),
            f"{row['prefill_seconds']:.2f}",
            f"{row['prefill_speedup']:.2f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_speedup']:.2f}",
            "–" if row["decode_density"] is None else share_read(row).removesuffix(" %"),
        ]
        cells += [f"{100 * row['score']:.0f} %"] if _scored(data) else []
        cells.append(_size(row["peak_memory_bytes"]))
        if data["ranks"] > 1:
            sent = (row["prefill_sent_bytes"], row["decode_sent_bytes_per_token"])
            cells.append(" / ".join(map(_size, sent)))
        rows.append(cells)
    return rows


def _size(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
