"""What the command writes: results on stdout, everything else on stderr; of several ranks, rank 0 does."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from . import launch


def prepare() -> None:
    """Show farspan's log lines and warnings as plain lines on stderr, and no results but rank 0's."""
    if not launch.leads():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (to the end of the process)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("farspan")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    note(f"Warning: {message}")


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    if launch.leads():
        print(text, file=sys.stderr, flush=True)


def interactive() -> bool:
    """Whether a person watches stderr: progress bars are for them alone."""
    return launch.leads() and sys.stderr.isatty()


def fail(sentence: str) -> None:
    """The one sentence that bad input ends in, whatever the rank."""
    print(f"farspan: {sentence}", file=sys.stderr, flush=True)


def table(*columns: str, title: str | None = None) -> Table:
    """A table whose first column stays whole and whose others wrap, so that it fits any terminal."""
    result = Table(title=title, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        result.add_column(column, no_wrap=number == 0, overflow="fold")
    return result


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr: yields `advance(done, total)`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not interactive()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(renderable: Any) -> None:
    """Print a table, or anything else rich can render, on stdout."""
    Console().print(renderable)


def show_text(text: str) -> None:
    """Print `text` on stdout as it is."""
    print(text, flush=True)


def show_json(value: Any) -> None:
    """Print `value` as JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
