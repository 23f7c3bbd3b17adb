"""Run methods over one batch of prompts; methods with the same prefill share one computation of it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..attention.errors import FarspanError
from ..attention.method import DECODE, PREFILL, AttentionMethod
from ..runtime.bind import takes, trained_under
from ..runtime.compress.spec import ATTENTION, method_of, split
from ..runtime.patch import patch
from ..runtime.report import Report
from ..runtime.specs import resolve
from ..runtime.store.storage import DEVICE, parse_storage
from . import batch as forward
from .identity import identify
from .ranks import Job

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Started:
    """A prefilled batch: the cache, the seconds of the prefill, the report's summary of what was read.

    keep: whether other methods continue from the same cache, so that it must not change.
    """

    cache: Any
    seconds: float
    summary: dict[str, Any]
    keep: bool = False

    def copy(self) -> Any:
        """A copy of the cache, which may be changed."""
        return copy.deepcopy(self.cache)

    def take(self) -> Any:
        """A cache that may be changed, for the last use under this method. Copied if other methods need
        it."""
        return self.copy() if self.keep else self.cache


def under_each(
    model: Any,
    batch: forward.Batch,
    specs: Sequence[str],
    recipe: str | Path | None,
    measure: Callable[[Any, Started], T],
    job: Job,
) -> Iterator[tuple[str, T]]:
    """Yield (spec, measure(patched, started)) for each method. The model is patched only while measuring.

    Methods with the same prefill (dense, for those that change decoding only) continue from copies of one
    prefill. It runs without the decode method, which then builds its state from the last prompt token. A
    decode method that needs more of the prompt's queries, or its hidden states, gets its own prefill, and so
    does one with adapters in the recipe. Where a decode method needs keys before RoPE, the prefill runs with
    it, so that the cache knows at which positions keys were rotated.
    """
    for prefill, group in by_prefill(specs, recipe):
        fed = next((spec for spec in group if resolve(spec)[1].needs.before_rope), None)
        if prefills_alone(group[0], recipe) or fed is not None:
            shared_by = patched_with(model, fed or group[0], recipe, job)
        else:
            how = {"recipe": recipe if takes(prefill, recipe) else None, "parallel": job.mesh}
            how["storage"] = job.storage
            shared_by = patch(model, prefill=prefill, **how)
        with shared_by as patched:
            shared: Started | None = start(model, batch, patched, job)
        for i, spec in enumerate(group):
            assert shared is not None
            started = replace(shared, keep=i < len(group) - 1)
            # the last method changes the cache, so it is not kept here
            shared = shared if started.keep else None
            with patched_with(model, spec, recipe, job) as patched:
                result = measure(patched, started)
            del started
            yield spec, result


def by_prefill(specs: Sequence[str], recipe: str | Path | None = None) -> list[tuple[Any, list[str]]]:
    """The specs grouped by their prefill method, in order of first mention; those that prefill alone are
    groups of their own."""
    groups: list[tuple[Any, list[str]]] = []
    for spec in specs:
        prefill, _ = resolve(spec)
        alike = (
            members
            for method, members in groups
            if method == prefill and not prefills_alone(members[0], recipe)
        )
        members = None if prefills_alone(spec, recipe) else next(alike, None)
        if members is None:
            groups.append((prefill, [spec]))
        else:
            members.append(spec)
    return groups


def prefills_alone(spec: str, recipe: str | Path | None) -> bool:
    """Whether the decode method of a spec needs more queries of a prompt than the last one, or its hidden
    states, or the recipe has adapters for the spec, which change the prompt's keys."""
    methods = resolve(spec)
    adapted = recipe is not None and any(trained_under(recipe, method) for method in methods)
    needs = methods[1].needs
    of_states = needs.hidden_states or needs.early_hidden_states is not None
    return adapted or of_states or methods[1].observation_window != 1


def start(model: Any, batch: forward.Batch, patched: Any | None, job: Job) -> Started:
    """Prefill the batch with the model as it is. patched: its patch, or None for an unpatched model."""
    with forward.timed(model.device) as clock:
        cache = forward.prefill(model, batch)
    summary = read_of(job.report(patched)) if patched else {}
    return Started(cache=cache, seconds=clock.seconds, summary=summary)


def check_methods(
    model: Any, methods: Sequence[str], recipe: str | Path | None, job: Job, *, shortens: bool = False
) -> list[str]:
    """The specs without repeats. Each is tried on the model, so that bad input raises here. shortens: whether
    a spec may ask for shorter prompts."""
    specs = list(dict.fromkeys(" ".join(spec.split()) for spec in methods))
    if not specs:
        raise FarspanError("no method was given; name at least one, such as dense.")
    for method in dict.fromkeys(method_of(spec, shortens=shortens) for spec in specs):
        with patched_with(model, method, recipe, job):
            pass
    return specs


def patched_with(model: Any, spec: str, recipe: str | Path | None, job: Job) -> Any:
    """`patch` over the ranks of a job. Only methods that take the recipe get it."""
    takes_it = any(takes(method, recipe) for method in resolve(spec))
    how = {"recipe": recipe if takes_it else None, "parallel": job.mesh, "storage": job.storage}
    return patch(model, spec, **how)


def common_settings(
    model: Any,
    tokenizer: Any,
    name: str,
    specs: Sequence[str],
    recipe: str | Path | None,
    storage: str | None = None,
) -> dict[str, Any]:
    """The settings that every evaluation writes: the model's name and identity, its dtype, the methods, their
    calibrations, and the storage of the cache where it is not the default. Over ranks every rank calls
    this."""
    return {
        "model": name,
        "identity": identify(model, tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "methods": list(specs),
        "recipes": recipes(specs, recipe),
        **({} if storage is None or parse_storage(storage) == DEVICE else {"storage": storage}),
    }


def recipes(specs: Sequence[str], recipe: str | Path | None) -> dict[str, str]:
    """A short hash of each calibration that a method uses, because another calibration gives other numbers.

    It includes those of a method underneath another one, and files of budgets.
    """
    found = {}
    for spec in specs:
        compression, own = split(spec)
        learned = (path for method in resolve(own) for path in _learned_from(method, recipe))
        scorer = [compression.scorer] if compression is not None and compression.scorer != ATTENTION else []
        paths = dict.fromkeys((*scorer, *learned))
        if paths:
            found[spec] = " + ".join(_digest(Path(path)) for path in paths)
    return found


def _learned_from(method: AttentionMethod, recipe: str | Path | None) -> Iterator[str | Path]:
    if method.needs.recipe and (method.recipe or recipe):
        yield method.recipe or recipe or ""
    if recipe is not None and trained_under(recipe, method):
        yield recipe
    yield from method.files
    if method.over is not None:
        yield from _learned_from(method.over, None)


def _digest(path: Path) -> str:
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    try:
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    except OSError as error:
        raise FarspanError(
            f"the recipe {path} cannot be read ({error.strerror}); give the path of a saved one."
        ) from None


def read_of(report: Report) -> dict[str, Any]:
    """A report's summary, with `layers`: the density of each layer in "prefill" and in "decode".

    One number stands for all layers where they are alike; it is None where the phase did not run.
    """
    layers = {}
    for phase in (PREFILL, DECODE):
        found = [layer.phases[phase].density for layer in report.layers]
        rounded = [None if density is None else round(density, 4) for density in found]
        layers[phase] = rounded if len(set(rounded)) > 1 else next(iter(rounded), None)
    return {**report.summary, "layers": layers}


def costs(started: Started, read: dict[str, Any], seconds: float, rows: int) -> dict[str, Any]:
    """The fields that all rows of a batch share: what was read, seconds per sample, fallbacks."""
    return {
        "density": {"prefill": started.summary["prefill_density"], "decode": read["decode_density"]},
        "layers": {"prefill": started.summary["layers"]["prefill"], "decode": read["layers"]["decode"]},
        "kv_read": (read["kv_bytes_read"] + read["selection_bytes"]) / max(read["kv_bytes_dense"], 1),
        "seconds": {"prefill": started.seconds / rows, "decode": seconds / rows},
        "batch": rows,
        "fallbacks": dict(started.summary["fallbacks"]) | dict(read["fallbacks"]),
        "implementation": read.get("implementation"),
    }


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A context with the model in eval mode; its mode is restored at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def meter(show: bool, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on stderr: yields `advance(count, description)`. total: None if it is not known."""
    if not show:
        yield lambda count, description: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def advance(count: int, description: str) -> None:
            bar.update(task, advance=count, description=description or None)

        yield advance
