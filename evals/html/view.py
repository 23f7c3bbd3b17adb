"""What a report shows, as plain values for the templates: headlines, tables, plots, samples, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import depths, words
from ..folders import NEEDLE, Evaluation, Found
from ..recommend import KEYS, WITHIN, Candidate, Recommendation, at_length, lengths_of
from ..results import unfinished_note
from ..summary import BASELINE
from ..tables import difference, effective_note, percent, share_read, short_length

DROPS = (1.0, 2.0, 5.0, 10.0)
"""The losses, in points, for which a report names the cheapest method."""
VERDICTS = {"within": "within the bound", "open": "not decided", "beyond": "loses more"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table: text, a smaller text under it, and a share from 0 to 1 that colours it."""

    text: str
    under: str = ""
    share: float | None = None

    def __str__(self) -> str:
        return f"{self.text} ({self.under})" if self.under else self.text


@dataclass(frozen=True)
class Grid:
    """A table: the first cell of a row is its heading. code: whether that is a method."""

    caption: str
    columns: Sequence[str]
    rows: list[list[Cell | str]]
    code: bool = True


@dataclass(frozen=True)
class Figure:
    """A plot with the table of its values. With a title the table is closed at first."""

    svg: Any
    grid: Grid
    title: str = ""


@dataclass(frozen=True)
class Headline:
    """The answer for one evaluation at its longest length. method: None where none is shown to be good."""

    where: str
    method: str | None
    sentence: str
    patch: str = ""
    command: str = ""
    doubts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Length:
    """What was measured at one length, beside dense."""

    name: str
    figures: list[Figure]
    tasks: Grid | None


@dataclass(frozen=True)
class Section:
    """An evaluation with scored answers."""

    title: str
    anchor: str
    choices: Grid | None
    patches: list[tuple[str, str, str]]
    lengths: list[Length]
    heatmaps: list[Figure]
    notes: list[str]
    samples: Sequence[Any] = ()


def recommendations(
    found: Found, one: Evaluation, length: int, drops: Sequence[float], confidence: float
) -> dict[float, Recommendation]:
    """What `recommend` says of one length, for each loss that may be allowed."""
    return {drop: at_length(found, one, length, length, drop, confidence, KEYS) for drop in drops}


def headline(
    found: Found, one: Evaluation, drops: Sequence[float] = DROPS, confidence: float = 0.95
) -> Headline:
    """The cheapest method at the longest length within the smallest of the losses that any method is within.

    Where none is, the sentence says so and names the method that comes closest.
    """
    length = max(lengths_of(one))
    beyond = f"Nothing was measured with this model beyond {length:,} tokens."
    where = f"{one.model}, {one.suite}, {short_length(length)} tokens"
    by_drop = recommendations(found, one, length, drops, confidence)
    for of in by_drop.values():
        if (chosen := of.chosen) is not None:
            said = f"{words.claim(found, one, of, chosen)} It is {words.bound(of)}."
            command = f"farspan generate --model {one.given} {chosen.options} --prompt-file FILE"
            doubts = [*_less_likely(one, length, chosen.method), *words.doubts(of), beyond]
            return Headline(where, chosen.method, said, chosen.patch, command, doubts)
    last = by_drop[max(by_drop)]
    if (closest := last.closest) is None:
        said = words.unanswerable(last) or "No method here reads fewer keys than dense."
        return Headline(where, None, said, doubts=[beyond])
    said = f"No method is shown to be {words.bound(last)}."
    more = words.needed(last, closest)
    doubts = [
        f"The closest is {closest.method}: it {words.claim(found, one, last, closest)} "
        f"{more[0].upper()}{more[1:]}.",
        *words.doubts(last),
        beyond,
    ]
    return Headline(where, None, said, doubts=doubts)


def _less_likely(one: Evaluation, length: int, method: str) -> list[str]:
    """A sentence where the likelihood of the right answers shows a loss that the score may not show yet."""
    for row in one.data["overall"]:
        found = row.get("nll_diff")
        if (row["method"], row["length"]) == (method, length) and found and (found["low"] or 0) > 0:
            return [
                "Right answers are less likely under it than under dense: by "
                f"{difference(row)} nats per token (95 %)."
            ]
    return []


def section(
    found: Found, one: Evaluation, number_: int, drops: Sequence[float] = DROPS, confidence: float = 0.95
) -> Section:
    """Everything about one evaluation with scores."""
    sizes = lengths_of(one)
    every = {size: recommendations(found, one, size, drops, confidence) for size in sizes}
    chosen = {rec.chosen.method: rec.chosen for recs in every.values() for rec in recs.values() if rec.chosen}
    title = f"{one.model} ({one.config.get('dtype')}), {one.suite}"
    lengths = [_length(one, size, every.get(size, {})) for size in reversed(one.data["lengths"])]
    return Section(
        title=title,
        anchor=f"evaluation-{number_}",
        choices=_choices(every, confidence) if chosen else None,
        patches=[(name, c.patch, c.options) for name, c in chosen.items()],
        lengths=[length for length in lengths if length.figures or length.tasks],
        heatmaps=_heatmaps(one) if one.suite == NEEDLE else [],
        notes=[*_notes(one.data), *effective_note(one.data), *one.config["stopped"]],
    )


def _choices(every: Mapping[int, Mapping[float, Recommendation]], confidence: float) -> Grid:
    """Lengths down, the loss that is allowed across: the cheapest method that is within it."""
    drops = list(next(iter(every.values())))
    rows: list[list[Cell | str]] = []
    for size in sorted(every, reverse=True):
        row: list[Cell | str] = [short_length(size)]
        for of in every[size].values():
            one = of.chosen
            row.append(Cell(one.method, words.reads(one)) if one else "–")
        rows.append(row)
    points = [f"{drop:g} {'point' if drop == 1 else 'points'}" for drop in drops]
    caption = (
        f"The cheapest method that loses at most so much of dense's score, with {percent(confidence, 0)} % "
        "confidence for each method; a dash where none is shown to be good enough"
    )
    return Grid(caption, ["length", *points], rows, code=False)


def _length(one: Evaluation, size: int, recs: Mapping[float, Recommendation]) -> Length:
    name, what = short_length(size), f"{one.model}, {one.suite}, {short_length(size)} tokens"
    return Length(name, _figures(one, size, recs, name, what) if recs else [], _tasks(one, size))


def _figures(
    one: Evaluation, size: int, recs: Mapping[float, Recommendation], name: str, what: str
) -> list[Figure]:
    from . import charts

    drop = next((drop for drop, of in recs.items() if of.chosen), max(recs))
    of = recs[drop]
    if not of.candidates:
        return []
    ordered = sorted(of.candidates, key=lambda c: (c.cost is None, c.cost or 0.0))
    points = [
        {
            "number": place,
            "cost": 100 * c.cost,
            "kept": 100 * c.kept,
            "low": None if c.half is None else 100 * (c.kept - c.half / c.baseline),
            "high": None if c.half is None else 100 * (c.kept + c.half / c.baseline),
            "chosen": c == of.chosen,
        }
        for place, c in enumerate(ordered, 1)
        if c.cost is not None and c.kept is not None
    ]
    nll = {row["method"]: _nll(row) for row in one.data["overall"] if row["length"] == size and row["n"]}
    head = ["method", "number", "prompts", "score", "dense", "lost (points)", "at most", "ΔNLL (95 %)"]
    grid = Grid(
        f"Score and cost of every method at {name}, the cheapest first; bound: {words.bound(of)}",
        [*head, "read %", "KV bytes", "bound"],
        [_quality_row(place, c, nll[c.method]) for place, c in enumerate(ordered, 1)],
    )
    figures = [Figure(charts.pareto(points, what) if len(points) > 1 else None, grid)]
    lost = [
        (c.method, -100 * c.loss, *((None, None) if c.half is None else _ends(c)))
        for c in sorted(of.candidates, key=lambda c: c.loss)
    ]
    if len(lost) > 1:
        table = Grid(
            f"Score minus dense's at {name}, in points",
            ["method", "difference", "interval"],
            [
                [m, f"{v:+.1f}", "too few" if lo is None else f"{lo:+.1f} to {hi:+.1f}"]
                for m, v, lo, hi in lost
            ],
        )
        axis = f"score minus dense (points, {percent(of.confidence, 0)} % interval)"
        figures.append(Figure(charts.intervals(lost, axis, what), table, table.caption))
    return figures


def _ends(one: Candidate) -> tuple[float, float]:
    assert one.half is not None
    return 100 * (-one.loss - one.half), 100 * (-one.loss + one.half)


def _quality_row(place: int, one: Candidate, nll: Cell) -> list[Cell | str]:
    shares = {"prefill_density": one.prefill_density, "decode_density": one.decode_density}
    return [
        one.method,
        str(place),
        str(one.n),
        percent(one.score, 1),
        percent(one.baseline, 1),
        f"{100 * one.loss:+.1f}",
        "–" if one.most is None else f"{100 * one.most:.1f}",
        nll,
        share_read(shares).removesuffix(" %"),
        percent(one.kv_read, 0, " %"),
        VERDICTS[one.verdict] if one.saves or one.verdict != WITHIN else "saves nothing",
    ]


def _nll(row: Mapping[str, Any]) -> Cell:
    mean, _, interval = difference(row).partition(" ")
    return Cell(mean, interval.strip("()"))


def _tasks(one: Evaluation, size: int) -> Grid | None:
    """Scores by method and task at one length, each with its difference from dense."""
    data = one.data
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in data["cells"]:
        if cell["length"] == size:
            cells.setdefault((cell["method"], cell["task"]), []).append(cell)
    tasks = [task for task in data["tasks"] if any(name == task for _, name in cells)]
    methods = [row["method"] for row in data["methods"] if any((row["method"], t) in cells for t in tasks)]
    if len(tasks) < 2:
        return None
    rows: list[list[Cell | str]] = [
        [method, *(_task_cell(cells.get((method, task), [])) for task in tasks)] for method in methods
    ]
    caption = (
        f"Score in percent by task at {short_length(size)}; below it the difference from dense on the same "
        "prompts with its 95 % interval, from six prompts on"
    )
    return Grid(caption, ["method", *(task.removeprefix("niah_") for task in tasks)], rows)


def _task_cell(found: Sequence[Mapping[str, Any]]) -> Cell | str:
    if len(found) != 1 or found[0]["score"] is None:
        return "–"
    cell = found[0]
    diff, under = cell["score_diff"], ""
    if diff is not None and cell["method"] != BASELINE:
        ends = "" if diff["low"] is None else f" [{100 * diff['low']:+.0f}, {100 * diff['high']:+.0f}]"
        under = f"{100 * diff['mean']:+.0f}{ends}"
    return Cell(percent(cell["score"], 0), under, cell["score"])


def _notes(data: Mapping[str, Any]) -> list[str]:
    """Sentences that explain the tables and plots of an evaluation."""
    counts = [cell["n"] for cell in data["cells"]]
    many = "" if min(counts) == max(counts) else f" to {max(counts)}"
    where = depths.note(data["cells"])
    return [
        "Score: mean over tasks of the published metric, in percent, of greedy answers; tasks at which dense "
        "scores 0 are left out, since no method can lose there. Lost: dense's score "
        "minus the method's on the same prompts, as the mean over tasks; at most: its upper confidence "
        "limit, which counts one prompt more at each end of the scale. An interval needs six prompts.",
        "ΔNLL: how much less likely the right answer is than under dense, in nats per token, with its 95 % "
        "interval. It shows a difference earlier than the score does.",
        "Read: share of the causal (query, key) pairs read in prefill / in decode. KV bytes: bytes read in "
        "decode, those read to select included. Cost is the mean of the two shares of keys read.",
        f"Prompts for each task and length: {min(counts)}{many}. Text: {data['haystack'] or 'none'}.",
        *([where] if where else []),
        *unfinished_note(data),
    ]


def _heatmaps(one: Evaluation) -> list[Figure]:
    from ..pictures import needle_grid
    from . import charts

    out = []
    for row in one.data["methods"]:
        grid, sizes, depths = needle_grid(one.data, row["method"])
        names, places = [short_length(s) for s in sizes], [f"{100 * d:.0f} %" for d in depths]
        total = f"{row['method']}: {percent(row['score'], 0)} % over {row['n']} prompts"
        table = Grid(
            f"Needle scores in percent by depth and length, {total}",
            ["depth", *names],
            [
                [place, *("–" if v != v else Cell(percent(v, 0), "", v) for v in line)]
                for place, line in zip(places, grid, strict=True)
            ],
            code=False,
        )
        out.append(Figure(charts.heatmap(grid, names, places, total), table, total))
    return out
