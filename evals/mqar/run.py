"""The runs of MQAR: every mixer, size, setting, seed and learning rate, into one folder that resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from ..results import ROW, Results
from ..run import Summary, finished_if_stopped
from ..shape import MAYBE_NUMBER
from . import report
from .layers import check_mixers
from .settings import NAMES, Setting, parse_setting
from .train import SOLVED, Run, Training, train

MQAR_ROW: dict[str, Any] = {
    **ROW,
    "settings": [str],
    "dim": int,
    "lr": (int, float),
    "seed": int,
    "accuracy": {str: (int, float)},
    "loss": MAYBE_NUMBER,
    "ended": str,
    "epochs": int,
    "state": {str: [int]},
    "cpu_seconds": (int, float),
}

_LARGEST = 1 << 14  # numbers of a hidden state: larger models do not fit into memory
_LONGEST = 1 << 20  # tokens of a sequence

Advance = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared: each of ``mixers`` (specs, see layers.py) at each of ``dims`` numbers of a hidden
    state, with each of ``seeds`` (of the weights and the data), at each of ``rates``, of which the best
    counts. apart: whether there is a model for each of ``settings``, as in Zoology's figure 2; otherwise one
    model is trained on all of them and tested on each, as in Based's comparison (2402.18668). all_rates:
    whether a sweep goes on after a rate that has solved every setting.

    Raises FarspanError for an empty list, for rates and seeds out of range, for sizes that are too large, and
    for what cannot be made.
    """

    mixers: list[str]
    settings: list[Setting]
    dims: list[int] = field(default_factory=lambda: [64])
    rates: list[float] = field(default_factory=lambda: [1e-2, 3e-3])
    seeds: list[int] = field(default_factory=lambda: [1])
    apart: bool = False
    all_rates: bool = False
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        for name in ("mixers", "settings", "dims", "rates", "seeds"):
            if not getattr(self, name):
                what = NAMES[self.settings[0].suite] if self.settings else "The comparison"
                raise FarspanError(f"{what} was given no {name}; give at least one.")
        if not all(0 < rate < 1 for rate in self.rates):
            raise FarspanError(f"Learning rates are above 0 and below 1; got {self.rates}.")
        if not all(0 <= seed < 1 << 31 for seed in self.seeds):
            raise FarspanError(f"Seeds are at least 0 and below 2^31; got {self.seeds}.")
        largest = max(self.dims)
        if largest > _LARGEST or largest * self.training.vocabulary > 1 << 31:
            raise FarspanError(
                f"Models of {largest:,} numbers and {self.training.vocabulary:,} tokens are too large: give "
                f"at most {_LARGEST:,} numbers, and at most 2^31 of numbers times tokens."
            )
        if len({setting.suite for setting in self.settings}) > 1:
            raise FarspanError("The settings are of MQAR and of ListOps; give one kind in a folder.")
        if max(setting.length for setting in self.settings) > _LONGEST:
            raise FarspanError(
                f"Sequences are of at most {_LONGEST:,} tokens; got "
                f"{max(setting.length for setting in self.settings):,}."
            )
        for setting in self.settings:
            setting.check(self.training.vocabulary, self.training.filler)
        check_mixers(
            self.mixers, self.dims, self.training.heads, self.training.first, self.settings[0].encoders
        )

    def sweeps(self) -> Iterator[list[Run]]:
        """Lists of runs that differ in the learning rate; the shortest sequences first."""
        settings = sorted(self.settings)
        for some in [(x,) for x in settings] if self.apart else [tuple(settings)]:
            for seed in self.seeds:
                for dim in self.dims:
                    for mixer in self.mixers:
                        yield [
                            Run(mixer=mixer, dim=dim, settings=some, lr=lr, seed=seed) for lr in self.rates
                        ]

    @property
    def config(self) -> dict[str, Any]:
        """The settings for config.json; all but the lists must be those of the folder."""
        return {
            "suite": self.settings[0].suite,
            "methods": self.mixers,
            "tasks": list(map(str, self.settings)),
            "dims": self.dims,
            "rates": self.rates,
            "seeds": self.seeds,
            "apart": self.apart,
            "mixture": None if self.apart else "+".join(map(str, sorted(self.settings))),
            "all_rates": self.all_rates,
            **asdict(self.training),
        }


def compare(
    comparison: Comparison,
    out: Path,
    *,
    device: str = "cpu",
    advance: Advance = lambda said: None,
) -> Summary:
    """Train and measure all models of ``comparison``.

    Each finished run is a row in ``out``, written at once; a run that was stopped goes on from its last
    epoch. advance: called with a sentence after each epoch. Raises ResultsError for a folder that cannot be
    used. On Ctrl-C the summary of the finished runs is written, then KeyboardInterrupt goes on.
    """
    with Results(out, comparison.config, session={"device": device}, row=MQAR_ROW) as results:
        results.plan({})
        with finished_if_stopped(results, finish):
            for runs in zip(*comparison.sweeps(), strict=True):  # a whole table at each learning rate
                for run in runs:
                    _train(run, comparison, results, device, advance)
        return finish(results)


def _train(run: Run, comparison: Comparison, results: Results, device: str, advance: Advance) -> None:
    """The row of ``run``, unless it is there or another rate of its sweep has solved every setting."""
    if results.done(run.key, run.mixer, {}) or (not comparison.all_rates and _solved(results.rows, run)):
        return
    name = hashlib.sha256(f"{run.mixer} {run.key}".encode()).hexdigest()[:16]
    checkpoints = results.out / "checkpoints" / name

    def said(epoch: int, accuracy: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {100 * share:.1f} %" for name, share in accuracy.items())
        of = f"epoch {epoch} of at most {comparison.training.epochs}"
        advance(f"{run.mixer} d={run.dim} lr={run.lr:g} seed={run.seed}, {of}: {shown}")

    row = train(run, comparison.training, checkpoints, device=device, progress=said)
    named = asdict(run) | {"settings": list(map(str, run.settings))}
    results.append([{**named, "key": run.key, "method": run.mixer, "recipe": {}, **row}])


def _solved(rows: list[dict[str, Any]], run: Run) -> bool:
    """Whether a run of the same sweep has solved every setting."""
    return any(
        row["ended"] == SOLVED and (row["method"], row["key"].rpartition("/")[0]) == run.sweep for row in rows
    )


def finish(results: Results) -> Summary:
    """Write summary.json, the table and the plot from the folder's rows."""
    config, rows = results.config, results.rows
    asked = Comparison(
        mixers=config["methods"],
        settings=[parse_setting(name) for name in config["tasks"]],
        **{name: config[name] for name in ("dims", "rates", "seeds", "apart", "all_rates")},
        training=Training(**{name: config[name] for name in asdict(Training())}),
    )
    data = report.summarise(config, rows)
    have = {(row["method"], row["key"]) for row in rows}
    open_sweeps = [
        runs[0]
        for runs in asked.sweeps()
        if not all((run.mixer, run.key) in have for run in runs)
        and (asked.all_rates or not _solved(rows, runs[0]))
    ]
    data["unfinished"] = list(dict.fromkeys(" ".join(run.sweep) for run in open_sweeps))
    data["complete"] = not open_sweeps
    results.write_summary(data)
    summary = Summary(out=results.out, data=data, complete=data["complete"])
    return replace(summary, files=report.write(results, data))
