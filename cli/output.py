"""What the command prints: results on stdout, everything else on stderr. With several ranks, rank 0
prints."""

from __future__ import annotations

import codecs
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from ..attention.errors import FarspanError
from ..runtime.table import Table
from . import launch

if TYPE_CHECKING:
    from ..evals.run import Summary
    from ..runtime.training.loop import Step

_PLAIN = str.maketrans(
    {
        "–": "-",
        "—": "-",
        "─": "-",
        "−": "-",
        "·": "-",
        "×": "x",
        "±": "+-",
        "Δ": "d",
        "µ": "u",
        "→": "->",
        "…": "...",
    }
)
_PLAINLY = "farspan.plainly"  # the error handler for characters that an encoding lacks


def prepare() -> None:
    """Show farspan's log lines and warnings as plain lines on stderr, and let only rank 0 print results.

    A character that the terminal's encoding lacks is replaced, such as "×" by "x", or by "?".
    """
    codecs.register_error(_PLAINLY, _plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_PLAINLY)
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


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = error.object[error.start : error.end].translate(_PLAIN)
    return plain.encode("ascii", "replace").decode("ascii"), error.end


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
    """Print a line on stderr."""
    if launch.leads():
        print(text, file=sys.stderr, flush=True)


def interactive() -> bool:
    """Whether stderr is a terminal. Only then progress bars are shown."""
    return launch.leads() and sys.stderr.isatty()


def fail(sentence: str) -> None:
    """Print the one sentence of an error on stderr, on any rank."""
    print(f"farspan: {sentence}", file=sys.stderr, flush=True)


def width() -> int:
    """The terminal's width in columns: the variable COLUMNS if it is set, 80 if there is no terminal."""
    return shutil.get_terminal_size().columns


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr: yields `advance(done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not interactive()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def training_progress() -> Iterator[Callable[[Step], None]]:
    """A progress bar on stderr with the loss, tokens per second and time left; yields `advance(step)`.

    Without a terminal, a line is printed for each tenth of the steps. A second stage begins its steps
    anew."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    loss, speed = TextColumn("loss {task.fields[loss]:.4f}"), TextColumn("{task.fields[speed]:,.0f} tokens/s")
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), loss, speed, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not interactive()) as bar:
        task = bar.add_task("steps", total=None, loss=math.nan, speed=0.0)
        begun, first, last = time.monotonic(), 0, 0

        def advance(step: Step) -> None:
            nonlocal begun, first, last
            if not last or step.done <= last:  # the first step, perhaps of a second stage
                begun, first = time.monotonic(), step.done
            last, speed = step.done, step.tokens_per_second
            bar.update(task, completed=step.done, total=step.total, loss=step.loss, speed=speed)
            if not interactive() and step.done % max(step.total // 10, 1) == 0:
                left = (time.monotonic() - begun) / max(step.done - first, 1) * (step.total - step.done)
                note(
                    f"step {step.done} of {step.total}: loss {step.loss:.4f}, {speed:,.0f} tokens/s, "
                    f"{left / 60:.0f} minutes left"
                )

        yield advance


def show(table: Table) -> None:
    """Print a table on stdout, at most as wide as the terminal; 80 columns if it is piped."""
    print(table.text(width()), end="\n\n")


def show_summary(summary: Summary, terminal_table: Callable[[Any], Table], json: bool) -> None:
    """Print the result of an evaluation, as JSON or as a table, and which files it wrote."""
    if json:
        return show_json(summary.data)
    show(terminal_table(summary.data))
    files = ["config.json", "samples.jsonl", "summary.json", *summary.files]
    note(f"Written to {summary.out}: {', '.join(files)}")


@contextmanager
def resumable(json: bool) -> Iterator[None]:
    """A context in which Ctrl-C prints one sentence (none with --json) and ends the command with exit code
    130. Finished work is on the disk."""
    from ..evals.ranks import interrupted

    try:
        yield
    except (KeyboardInterrupt, FarspanError) as error:
        if not interrupted(error):
            raise
        if not json:
            note("\nStopped; what was finished is kept. Run the same command to go on.")
        raise typer.Exit(130) from None


def show_text(text: str) -> None:
    """Print `text` on stdout as it is."""
    print(text, flush=True)


def show_json(value: Any) -> None:
    """Print `value` as JSON on stdout, with escapes if the encoding of stdout is not a Unicode one."""
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode))
