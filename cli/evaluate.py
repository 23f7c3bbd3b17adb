"""`farspan eval`: each suite runs every method beside the dense model in one run; mqar and listops stand in
files of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..attention.errors import FarspanError
from . import launch, options, output
from .eval_options import Fidelity, LmEval, Needle, Perplexity, Retrieval, Ruler, Speed, Turns
from .mqar import listops, mqar

app = typer.Typer(
    help="Measure methods beside the dense model: scores, likelihoods, keys read, seconds. "
    "Stopped runs resume.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.command()(mqar)
app.command()(listops)


@app.command(cls=launch.SpreadCommand)
@options.command
def ruler(given: Ruler) -> None:
    """RULER (arXiv 2404.06654): its 13 tasks, worded and scored as published. Published lengths: 4K to
    128K."""
    _measure(given, "ruler")


@app.command(cls=launch.SpreadCommand)
@options.command
def needle(given: Needle) -> None:
    """Needle in a haystack: facts at a depth of a long text, as a depth × length heatmap per method."""
    _measure(given, "needle")


@app.command(cls=launch.SpreadCommand)
@options.command
def retrieval(given: Retrieval) -> None:
    """InfiniteBench's synthetic tasks (arXiv 2402.13718) at any length: a passkey in noise, a value in
    JSON."""
    _measure(given, "retrieval")


@app.command(cls=launch.SpreadCommand)
@options.command
def turns(given: Turns) -> None:
    """Several questions about one context, in the turns of one conversation (after SCBench, arXiv
    2412.10319)."""
    _measure(given, "turns")


@app.command(cls=launch.SpreadCommand)
@options.command
def fidelity(given: Fidelity) -> None:
    """How far each method's next-token distributions are from dense's, on your own prompts."""
    _measure(given, "fidelity")


@app.command("lm-eval", cls=launch.SpreadCommand)
@options.command
def lm_eval(given: LmEval) -> None:
    """Any task of the lm-evaluation-harness under each method, with what was read beside its scores."""
    ranks = given.on.spread()
    specs, names = options.split_methods(given.methods), options.split_list(given.tasks)
    from ..evals import harness, report

    harness.check(names, given.truncate)
    model, tokenizer = given.on.load(given.model, given.rope, ranks)
    setup = _setup(given, "lm-eval", model, tokenizer, specs, {"rope": given.rope}, ranks)
    how = {name: getattr(given, name) for name in ("limit", "fewshot", "batch_size", "truncate", "include")}
    with output.resumable(given.json):
        summary = harness.harness(setup, names, **how)
    output.show_summary(summary, report.terminal_table, given.json)


@app.command(cls=launch.SpreadCommand)
@options.command
def ppl(given: Perplexity) -> None:
    """Perplexity through each method's own decode path, and its difference from dense on the same text."""
    _measure(given, "ppl")


@app.command(cls=launch.SpreadCommand)
@options.command
def speed(given: Speed) -> None:
    """Prefill seconds and decode tokens per second, each method beside the unpatched model in one run.

    Under a launcher each method runs over the ranks and is compared with dense attention over the same ranks.
    The table then also has the peak memory of a rank and the bytes that it sends.
    """
    _measure(given, "speed")


Tasks = Ruler | Needle | Retrieval | Turns | Fidelity | Perplexity | Speed


def _measure(given: Tasks, name: str) -> None:
    """Run a suite of `evals/suites.py`."""
    from ..evals import report
    from ..evals.suites import SUITES
    from ..evals.task import settings
    from ..runtime.models import check_length

    ranks = given.on.spread()
    specs = options.split_methods(given.methods, shortens=SUITES[name].shortens)
    rows = options.batch_size(str(getattr(given, "batch_size", 1)))
    suite = _suite(given, name)
    model, tokenizer = given.on.load(given.model, given.rope, ranks)
    tokenizer, config = settings(suite, tokenizer, chat=getattr(given, "chat", None), rope=given.rope)
    # What cannot be served ends here, before the output folder is made.
    check_length(model, suite.longest(tokenizer), what="The longest sample")
    suite.check(tokenizer)
    setup = _setup(given, name, model, tokenizer, specs, config, ranks)
    with output.resumable(given.json):
        summary = suite.run(setup, suite.draw(tokenizer), batch_size=rows)
    output.show_summary(summary, report.terminal_table, given.json)


def _suite(given: Tasks, name: str) -> Any:
    """The suite that the options ask for."""
    from ..evals.fidelity import read_prompts
    from ..evals.suites import options_of, suite_of

    read: dict[str, Callable[[Any], Any]] = {
        "lengths": lambda values: options.whole_numbers(values, "--lengths"),
        "tasks": options.split_list,
        "depths": _depths,
        "qa_data": lambda values: options.split_list(values or []),
        "prompts": read_prompts,
    }
    asked = {option: getattr(given, option, None) for option in options_of(name)}
    asked |= {"text": getattr(given.files, "text", None)}
    return suite_of(name, **{n: read[n](value) if n in read else value for n, value in asked.items()})


def _setup(
    given: Tasks | LmEval,
    suite: str,
    model: Any,
    tokenizer: Any,
    methods: list[str],
    config: dict[str, Any],
    ranks: Any,
) -> Any:
    """What the evaluation measures and where it writes."""
    from ..evals.setup import Setup

    return Setup(
        model=model,
        tokenizer=tokenizer,
        methods=methods,
        out=_folder(given.files.out, suite, given.model),
        name=given.model,
        config=config,
        recipe=given.files.recipe,
        storage=given.storage,
        parallel=ranks,
        progress=output.interactive() and not given.json,
    )


def _depths(values: list[str]) -> list[float]:
    try:
        places = [float(item) for item in options.split_list(values)]
    except ValueError:
        places = []
    if not places:
        raise FarspanError(
            f"--depths takes numbers from 0 to 1 such as 0.5; got {', '.join(values) or 'none'}."
        )
    return list(dict.fromkeys(places))


def _folder(out: Path | None, suite: str, model: str) -> Path:
    name = Path(os.path.abspath(Path(model).expanduser())).name or "model"  # "." gives its folder's name
    return out or Path("out") / f"{suite}-{name}"
