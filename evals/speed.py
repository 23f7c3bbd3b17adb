"""Prefill seconds and decode tokens per second, each method beside the unpatched model in one run.

Repeats are interleaved (unpatched, each method, then again), so a machine that slows down slows all alike;
medians are reported, and ratios to the unpatched model are what can be compared between machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from ..attention.errors import FarspanError
from . import batch as forward
from .perplexity import cut_windows
from .report import markdown
from .results import Results
from .run import Summary
from .shared import check_methods, evaluating, meter, patched_with, recipes, start

UNPATCHED = "unpatched"


def speed(
    model: Any,
    tokenizer: Any,
    text: str,
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
    progress: bool = True,
) -> Summary:
    """Time every method at every prompt length: all prompt tokens but one in prefill, `new_tokens` by
    `generate`.

    Decoding goes through a plain `model.generate` that may not stop early. Writes a folder like the other
    evaluations', but is never resumed: times of two runs are not one measurement.
    """
    if min(lengths, default=0) < 2 or min(new_tokens, repeats, batch_size) < 1:
        raise FarspanError(
            f"lengths {list(lengths)}, new_tokens {new_tokens}, repeats {repeats}, batch_size {batch_size}: "
            "lengths must be at least 2 and the others at least 1."
        )
    specs = check_methods(model, methods, recipe)
    pad = forward.pad_token(tokenizer, forward.end_tokens(model, tokenizer))
    prompts = {
        length: list(cut_windows(tokenizer, text, length, batch_size)) for length in sorted(set(lengths))
    }
    settings = {
        **config,
        "suite": "speed",
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "methods": specs,
        "recipes": recipes(specs, recipe),
        "lengths": sorted(set(lengths)),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "batch_size": batch_size,
    }

    def once(spec: str, prompt: list[list[int]], count: int) -> dict[str, Any]:
        batch = forward.collate(prompt, pad, model.device)
        with nullcontext() if spec == UNPATCHED else patched_with(model, spec, recipe) as patched:
            started = start(model, batch, patched)
            if patched:
                patched.reset_report()
            with forward.timed(model.device) as clock:
                forward.greedy(
                    model, batch, started.take(), max_new_tokens=count, pad=pad, eos=(), exactly=True
                )
            read = patched.report().summary if patched else {}
        return {
            "prefill_seconds": started.seconds,
            "decode_tokens_per_second": len(prompt) * count / clock.seconds,
            "prefill_density": started.summary.get("prefill_density"),
            "decode_density": read.get("decode_density"),
            "implementation": read.get("implementation"),
        }

    everyone = [UNPATCHED, *specs]
    with Results(out, settings) as results, evaluating(model):
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
                        results.append([{**place, "length": length, **once(spec, prompt, new_tokens)}])
                        advance(1, f"{length} · {spec}")
        data = summarise(results.config, results.rows)
        results.write_summary(data)
        results.write_text("speed.md", f"# speed: {model_name} ({data['dtype']})\n\n{speed_table(data)}")
        return Summary(out=results.out, data=data, complete=True, files=["speed.md"])


def summarise(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over repeats per (method, length), and ratios to the unpatched model (above 1 is faster)."""
    overall = []
    for length in config["lengths"]:
        base: dict[str, float] = {}
        for method in [UNPATCHED, *config["methods"]]:
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
                    "prefill_density": mine[0]["prefill_density"],
                    "decode_density": mine[0]["decode_density"],
                }
            )
    named = ("suite", "model", "dtype", "versions", "new_tokens", "batch_size")
    return {**{name: config.get(name) for name in named}, "complete": True, "overall": overall}


def speed_table(data: Mapping[str, Any]) -> str:
    """Markdown: a row per method and length."""
    head = [
        "method",
        "length",
        "prefill s",
        "× unpatched",
        "decode tokens/s",
        "× unpatched",
        "keys read (decode)",
    ]
    return markdown(head, [[f"`{cells[0]}`", *cells[1:]] for cells in _cells(data)])


def terminal_table(data: Mapping[str, Any]) -> Any:
    """A rich Table of the same rows."""
    from rich.table import Table

    table = Table(
        title=f"speed · {data['model']}", caption="× = faster than the unpatched model by this factor"
    )
    for name in ("method", "length", "prefill s", "×", "tokens/s", "×", "read"):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for cells in _cells(data):
        table.add_row(*cells)
    return table


def _cells(data: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["method"],
            str(row["length"]),
            f"{row['prefill_seconds']:.2f}",
            f"{row['prefill_speedup']:.2f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_speedup']:.2f}",
            "–" if row["decode_density"] is None else f"{100 * row['decode_density']:.1f} %",
        ]
        for row in data["overall"]
    ]
