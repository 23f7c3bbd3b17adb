"""The runs of MQAR: every mixer, size, setting, seed and learning rate, into one folder that resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from ..pictures import slug
from ..results import ROW, Results
from ..run import Summary
from ..shape import MAYBE_NUMBER
from . import report
from .data import Setting, check
from .layers import check_mixers
from .train import SOLVED, Run, Training, train

MQAR_ROW: dict[str, Any] = {
    **ROW,
    "setting": {"length": int, "pairs": int},
    "dim": int,
    "lr": (int, float),
    "seed": int,
    "accuracy": (int, float),
    "loss": MAYBE_NUMBER,
    "ended": str,
    "epochs": int,
    "state": [int],
    "cpu_seconds": (int, float),
}

Advance = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared: each of ``mixers`` (specs, see layers.py) at each of ``dims`` numbers of a hidden
    state, on each of ``settings``, with each of ``seeds`` (of the weights and the data), at each of
    ``rates``, of which the best counts. all_rates: whether the sweep goes on after a rate that solves its
    cell.

    Raises FarspanError for an empty list, for rates that are not positive, and for what cannot be made.
    """

    mixers: list[str]
    settings: list[Setting]
    dims: list[int] = field(default_factory=lambda: [64])
    rates: list[float] = field(default_factory=lambda: [3e-3, 1e-3])
    seeds: list[int] = field(default_factory=lambda: [1])
    all_rates: bool = False
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        for name in ("mixers", "settings", "dims", "rates", "seeds"):
            if not getattr(self, name):
                raise FarspanError(f"MQAR was given no {name}; give at least one.")
        if not all(0 < rate < 1 for rate in self.rates):
            raise FarspanError(f"Learning rates are above 0 and below 1; got {self.rates}.")
        if min(self.seeds) < 0:
            raise FarspanError(f"Seeds are at least 0; got {self.seeds}.")
        for setting in self.settings:
            check(setting, self.training.vocabulary, self.training.filler)
        check_mixers(self.mixers, self.dims, self.training.heads, self.settings)

    def cells(self) -> Iterator[list[Run]]:
        """The sweeps, each a list of runs that differ in the learning rate; the shortest sequences first."""
        for setting in sorted(self.settings):
            for seed in self.seeds:
                for dim in self.dims:
                    for mixer in self.mixers:
                        yield [
                            Run(mixer=mixer, dim=dim, setting=setting, lr=lr, seed=seed) for lr in self.rates
                        ]

    @property
    def config(self) -> dict[str, Any]:
        """The settings for config.json; all but the lists must be those of the folder."""
        return {
            "suite": "mqar",
            "methods": self.mixers,
            "tasks": list(map(str, self.settings)),
            "dims": self.dims,
            "rates": self.rates,
            "seeds": self.seeds,
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
        try:
            for runs in comparison.cells():
                _sweep(runs, comparison, results, device, advance)
        except KeyboardInterrupt:
            finish(results)
            raise
        return finish(results)


def _sweep(runs: list[Run], comparison: Comparison, results: Results, device: str, advance: Advance) -> None:
    """Those runs of one sweep that have no row yet; none after a rate that has solved the cell."""
    for run in runs:
        if not comparison.all_rates and _solved(results.rows, run):
            return
        if results.done(run.key, run.mixer, {}):
            continue
        name = f"{run.mixer} {run.setting} d={run.dim} lr={run.lr:g} seed={run.seed}"
        checkpoints = results.out / "checkpoints" / f"{slug(run.mixer, 0)}_{slug(run.key, run.dim)}"

        def said(epoch: int, accuracy: float, name: str = name) -> None:
            epochs = comparison.training.epochs
            advance(f"{name}: epoch {epoch} of at most {epochs}, {100 * accuracy:.1f} %")

        row = train(run, comparison.training, checkpoints, device=device, progress=said)
        results.append([{**asdict(run), "key": run.key, "method": run.mixer, "recipe": {}, **row}])


def _solved(rows: list[dict[str, Any]], run: Run) -> bool:
    return any(row["ended"] == SOLVED and _cell(row) == run.cell for row in rows)


def _cell(row: Mapping[str, Any]) -> tuple[str, int, Setting, int]:
    return row["method"], row["dim"], Setting(**row["setting"]), row["seed"]


def finish(results: Results) -> Summary:
    """Write summary.json, the table and the plot from the folder's rows."""
    config, rows = results.config, results.rows
    asked = Comparison(
        mixers=config["methods"],
        settings=[Setting.parse(name) for name in config["tasks"]],
        **{name: config[name] for name in ("dims", "rates", "seeds", "all_rates")},
        training=Training(**{name: config[name] for name in asdict(Training())}),
    )
    data = report.summarise(config, rows)
    have = {(row["method"], row["key"]) for row in rows}
    open_cells = [
        runs[0]
        for runs in asked.cells()
        if not all((run.mixer, run.key) in have for run in runs)
        and (asked.all_rates or not _solved(rows, runs[0]))
    ]
    data["unfinished"] = list(dict.fromkeys(f"{run.mixer} {run.setting}" for run in open_cells))
    data["complete"] = not open_cells
    results.write_summary(data)
    summary = Summary(out=results.out, data=data, complete=data["complete"])
    return replace(summary, files=report.write(results, data))
