"""The page of a report. All texts of results are escaped, and the page has no script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from .. import words
from ..folders import FROM_SCRATCH, SPEED, Evaluation, Found
from ..pictures import check_matplotlib
from ..recommend import lengths_of
from ..settings import versions
from ..tables import short_length
from .costs import break_even, inspected, layer_densities, speed_figures, speed_table
from .others import fidelities, harnesses, perplexities, recalls
from .samples import choose
from .settings import made
from .view import DROPS, headline, section

HERE = Path(__file__).parent
MOST_BYTES = 2_000_000
"""The size that a page may have."""


def page(
    found: Found, *, title: str | None = None, drops: Sequence[float] = DROPS, confidence: float = 0.95
) -> str:
    """The HTML of a report. drops: the losses in points for which a method is looked for, ascending.

    Raises FarspanError where jinja2 or matplotlib is missing.
    """
    check_matplotlib()
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise FarspanError("A report needs jinja2: pip install 'farspan[evals]'.") from None

    answers = sorted(found.answers(), key=lambda one: -len(one.rows))
    sections = [section(found, one, number, drops, confidence) for number, one in enumerate(answers, 1)]
    context: dict[str, Any] = {
        "title": title or f"farspan report: {', '.join(dict.fromkeys(_names(found)))}",
        "version": versions()["farspan"],
        "folders": ", ".join(folder.name for one in found.evaluations for folder in one.folders)
        or f"{len(found.inspections)} inspections",
        "headlines": [headline(found, one, drops, confidence) for one in answers if lengths_of(one)],
        "measured": _measured(answers),
        "perplexities": [*perplexities(found), *fidelities(found), *harnesses(found)],
        "speeds": [_speed(one) for one in found.of(SPEED)],
        "layers": [
            *(figure for one in found.evaluations for figure in layer_densities(one)),
            *inspected(found.inspections),
        ],
        "recalls": recalls(found),
        "made": [made(one) for one in found.evaluations],
        "css": Markup((HERE / "report.css").read_text(encoding="utf-8")),
    }
    ids = [("answer", "Which method to use"), *((item.anchor, item.title) for item in sections)]
    ids += [("perplexity", "Likelihoods and harness")] if context["perplexities"] else []
    ids += [("speed", "Speed"), ("layers", "Layers")]
    ids += [("recall", "Trained from scratch")] if context["recalls"] else []
    context["contents"] = [*ids, ("made", "How it was measured")]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["breakable"] = _breakable
    environment.filters["tied"] = lambda text: str(text).replace(" %", "\N{NO-BREAK SPACE}%")
    template = environment.get_template("report.html.j2")
    text = ""
    for most in (None, 4, 0):  # fewer samples where the page is too large
        shown = [choose(one)[:most] for one in answers]
        context["sections"] = [
            replace(item, samples=samples) for item, samples in zip(sections, shown, strict=True)
        ]
        text = template.render(context)
        if len(text.encode()) <= MOST_BYTES:
            break
    return text


def _breakable(method: object) -> Any:
    """A method's spec with places where a narrow table may break it: behind commas, colons and plus signs."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([,:+])", r"\1<wbr>", str(escape(method))))


def _names(found: Found) -> list[str]:
    named = [one.model for one in found.evaluations if one.suite not in FROM_SCRATCH]
    return named or [one.model for one in found.evaluations] or [str(x["model"]) for x in found.inspections]


def _measured(answers: Sequence[Evaluation]) -> str:
    sizes = sorted({size for one in answers for size in lengths_of(one)})
    if not sizes:
        return ""
    named = ", ".join(map(short_length, sizes))
    return f"Lengths measured here: {named} tokens. Of any other length this page says nothing."


def _speed(one: Evaluation) -> dict[str, Any]:
    return {
        "title": f"{one.model} ({one.config.get('dtype')})",
        "machine": f"Measured on {words.machine(one)}.",
        "even": break_even(one),
        "figures": speed_figures(one),
        "table": speed_table(one),
    }
