"""The commands `models`, `methods`, `generate`, `tune` and `calibrate`; `eval` is in evaluate.py."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.errors import FarspanError
from . import doctor as examining
from . import evaluate, launch, options, output
from . import inspect as inspecting
from . import plan as planning

app = typer.Typer(
    name="farspan",
    help="Make a pretrained causal LM read a long context cheaply, and measure what that costs in quality.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluate.app, name="eval")
app.command()(planning.plan)
app.command()(inspecting.inspect)
app.command()(examining.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"farspan {version('farspan')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def models(json: options.Json = False) -> None:
    """The aliases: models that need no hub, and where they are kept.

    Any hub id, local folder or GGUF file works too.
    """
    from ..runtime.models import ALIASES, cached

    rows: list[dict[str, Any]] = [
        {
            "alias": name,
            "title": alias.title,
            "positions": alias.positions,
            "license": alias.license,
            "source": f"PyPI: {', '.join(part.requirement for part in alias.parts)}",
            "origin": alias.origin,
            "cached": str(folder) if (folder := cached(name)) else None,
        }
        for name, alias in ALIASES.items()
    ]
    if json:
        return output.show_json(rows)
    table = output.Table("alias", "model", "positions", "kept in")
    for row in rows:
        kept = row["cached"] or "fetched on first use"
        table.add_row(
            row["alias"], f"{row['title']}. {row['license']}. {row['origin']}.", str(row["positions"]), kept
        )
    output.show(table)


@app.command()
def methods(json: options.Json = False) -> None:
    """Every attention method: name, family, paper, parameters and their defaults."""
    from ..attention.spec import methods as registry

    rows = [_describe(name, cls) for name, cls in registry().items()]
    if json:
        return output.show_json(rows)
    table = output.Table("name", "family", "phases", "paper", "parameters and defaults")
    for row in rows:
        parameters = ", ".join(_with_default(parameter) for parameter in row["parameters"])
        phases, paper = "\n".join(row["phases"]), row["paper"] or "–"
        table.add_row(row["name"], row["family"], phases, paper, parameters or "–")
    output.show(table)


def _with_default(parameter: dict[str, Any]) -> str:
    if parameter["required"]:
        return str(parameter["name"])
    default = parameter["default"]
    spelt = str(default).lower() if default is None or isinstance(default, bool) else default
    return f"{parameter['name']}={spelt}"


def _describe(name: str, cls: Any) -> dict[str, Any]:
    parameters = [
        {
            "name": field.name,
            "type": field.type if isinstance(field.type, str) else field.type.__name__,
            "required": field.default is dataclasses.MISSING,
            "default": None if field.default is dataclasses.MISSING else field.default,
        }
        for field in dataclasses.fields(cls)
        if field.init and field.metadata.get("spec", True)
    ]
    plain = None if any(parameter["required"] for parameter in parameters) else cls()
    return {
        "name": name,
        "title": cls.title,
        "family": cls.family,
        "paper": cls.paper,
        "phases": sorted(cls.phases, reverse=True),  # prefill, then decode
        "summary": (cls.__doc__ or "").strip().partition("\n")[0],
        "needs_recipe": None if plain is None else plain.needs.recipe,  # with the default parameters
        "lookahead": None if plain is None else str(plain.lookahead),
        "parameters": parameters,
    }


@app.command(cls=launch.SpreadCommand)
def generate(
    model: options.Model = options.DEFAULT_MODEL,
    method: Annotated[
        str, typer.Option(help="What attention reads; see above and `farspan methods`.")
    ] = "dense",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help='The prompt itself; "-" reads stdin.')
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help='A UTF-8 text file; "-" reads stdin.')] = None,
    max_new_tokens: Annotated[int, options.tokens("Stop after this many tokens.")] = 256,
    chat: options.Chat = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above 0 samples.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    prefill_chunk: Annotated[
        int | None, options.tokens("Read the prompt in chunks of this many tokens.")
    ] = None,
    crossover: Annotated[
        str | None,
        options.crossover('Read densely below this many keys; "auto" takes what `farspan tune` measured.'),
    ] = None,
    recipe: options.Recipe = None,
    rope: options.Rope = None,
    beyond_positions: Annotated[
        bool,
        typer.Option("--beyond-positions", help="Only warn when the prompt passes the model's positions."),
    ] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    parallel: options.Parallel = "auto",
    json: options.Json = False,
) -> None:
    """Continue a prompt; the answer streams to stdout, what was read goes to stderr at the end.

    A method is written name:par=value,par=value, as in "recycled:k=512,stride=10"; "A + B" is A in prefill
    and B in decode. Under a launcher, as in `torchrun --nproc-per-node 2 -m farspan generate ...`, the prompt
    and its cache are spread over the ranks; the report is of all of them together.
    """
    ranks = options.spread_over(parallel)
    text = _prompt_text(prompt, prompt_file, ranks)
    options.one_method(method)  # a misspelt method ends here, before the model is loaded
    from ..runtime.models import check_length, encode_prompt, positions, text_streamer

    causal_lm, tokenizer = options.load_model(model, rope=rope, dtype=dtype, device=device, parallel=ranks)
    ids = encode_prompt(tokenizer, text, chat=chat).to(causal_lm.device)
    length = ids.shape[1]
    check_length(causal_lm, length, strict=not beyond_positions)
    if length <= (positions(causal_lm) or length):
        both = f"The prompt with its answer (--max-new-tokens {max_new_tokens})"
        check_length(causal_lm, length + max_new_tokens, what=both, strict=False)

    import torch

    from ..evals.ranks import Job
    from ..runtime.hf import answer_by, kept_config, streams
    from ..runtime.patch import patch

    torch.manual_seed(seed)
    decided: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature:
        decided |= {"temperature": temperature, "top_p": top_p}
    config, set_aside = kept_config(causal_lm, **decided)
    if set_aside:
        output.note(f"Set aside of the model's generation config: {', '.join(set_aside)}.")
    how: dict[str, Any] = {"recipe": recipe, "prefill_chunk": prefill_chunk, "crossover": crossover}
    with Job(causal_lm, ranks) as job, patch(causal_lm, method, parallel=job.mesh, **how) as patched:
        streamer = text_streamer(tokenizer) if streams(config) and not json else None
        started = time.perf_counter()
        answer = answer_by(causal_lm, config, ids, tokenizer, streamer)
        seconds = time.perf_counter() - started
        report = job.report(patched)
    written = tokenizer.decode(answer, skip_special_tokens=True)
    if json:
        return output.show_json(
            {
                "model": model,
                "method": method,
                "ranks": job.size,
                "prompt_tokens": length,
                "new_tokens": len(answer),
                "seconds": seconds,
                "text": written,
                "set_aside": set_aside,
                "report": report.to_dict(),
            }
        )
    if streamer is None:
        output.show_text(written)
    over = f" over {job.size} ranks" if job.size > 1 else ""
    output.note(f"\n{length} tokens read, {len(answer)} written in {seconds:.1f} s{over}")
    output.note(report.text(output.width()))


def _prompt_text(prompt: str | None, file: Path | None, ranks: Any) -> str:
    """The prompt; of several ranks one reads it, as they share stdin and may not share a disk."""

    def read() -> str:
        return options.read_prompt(prompt, file)

    return read() if ranks is None else launch.on_rank_0(read)


@app.command()
def tune(
    methods: Annotated[
        list[str], typer.Option(help='Methods to measure; repeatable, or one list separated by ";".')
    ],
    model: options.Model = options.DEFAULT_MODEL,
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            help="Numbers of keys; repeatable, or one list: 1024,2048,4K [default: 512 to 16K in prefill, 1K "
            "to 128K at decode]."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls, of which the median counts.")] = 5,
    recipe: options.Recipe = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Measure from which length a method is faster than dense on this device, for --crossover auto."""
    if launch.size() > 1:
        raise FarspanError(
            f"farspan tune measures one device by itself, and a launcher has started {launch.size()} ranks: "
            "run it without one."
        )
    specs = options.split_methods(methods)
    sizes = sorted(options.whole_numbers(lengths, "--lengths")) if lengths else None
    from ..runtime.crossover import check_kept

    check_kept()
    causal_lm, _ = options.load_model(model, rope=None, dtype=dtype, device=device)
    from ..runtime.tune import tune as run

    with output.progress("lengths measured") as advance:
        measured = run(causal_lm, specs, lengths=sizes, recipe=recipe, repeats=repeats, progress=advance)
    if json:
        return output.show_json([dataclasses.asdict(m) | {"crossover": m.crossover} for m in measured])
    table = output.Table("method", "phase", "times dense's speed at", "faster from")
    for m in measured:
        ratios = ", ".join(
            f"{length}: {dense / seconds:.2f}"
            for length, dense, seconds in zip(m.lengths, m.dense, m.seconds, strict=True)
        )
        table.add_row(m.method, m.phase, ratios, str(m.crossover or "no length measured"))
    output.show(table)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the recipe is saved.")],
    text: Annotated[
        list[str], typer.Option(help='A text file or folder of .txt files, repeatable, or "sotu".')
    ],
    model: options.Model = options.DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="The method to calibrate.")] = "double_sparsity",
    by: Annotated[
        str | None,
        typer.Option(
            help='double_sparsity: rank channels by "q", "k" (mean magnitude) or "qk" (mean |q·k|) '
            "[default: qk]."
        ),
    ] = None,
    start: Annotated[
        float | None,
        typer.Option(
            help="sale: the threshold that every head begins with, and the highest it can get [default: "
            "0.008]."
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(help="sale: how far a query's output may be off on average [default: 0.4]."),
    ] = None,
    sure: Annotated[
        float | None,
        typer.Option(help="act: take heads whose gain is above so many standard errors [default: 1]."),
    ] = None,
    tokens: Annotated[int, options.tokens("Tokens of the text to read.")] = 4096,
    window: Annotated[int, options.tokens("Tokens that are read at a time.")] = 2048,
    rope: options.Rope = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Calibrate a method on text you name and save the recipe, for `--recipe` of the other commands.

    One process does that; of a launcher's ranks, rank 0.
    """
    launch.only_rank_0()
    from ..runtime.writable import check_writable

    check_writable(out, "give another --out")
    options.one_method(method)
    prose = evaluate.read_prose(text)
    causal_lm, tokenizer = options.load_model(model, rope=rope, dtype=dtype, device=device)
    from ..runtime.calibrate import calibrate as run

    asked = {"by": by, "start": start, "error": error, "sure": sure}
    given = {name: x for name, x in asked.items() if x is not None}
    with output.progress("tokens read") as advance:
        recipe = run(
            causal_lm,
            tokenizer,
            prose,
            method=method,
            tokens=tokens,
            window=window,
            progress=advance,
            **given,
        )
    recipe.save(out)
    output.note(f"Saved the recipe to {out}; use it with --recipe {out}.")
