"""`farspan eval mqar` and `listops`: what kinds of sequence mixers can recall and compute, by small models
trained from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.errors import FarspanError
from . import options, output

_OUT = typer.Option("--out", "-o", help="The output folder; resumed if it is there.")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Options of `farspan eval mqar` and `listops`."""

    mixers: Annotated[
        list[str],
        typer.Option(
            help='"attention", mixers, methods that select in prefill, or A+B for layers 1 and 2. Repeat it, '
            'or one list: "attention,mamba2+block_topk:k=32,block=16".'
        ),
    ] = field(default_factory=lambda: ["attention,mamba2,base_conv,mamba2+attention"])
    first: Annotated[
        str, typer.Option(help='Layer 1 of the mixers that are not A+B; "same": the mixer itself.')
    ] = "base_conv:length=3"
    dim: Annotated[
        list[str], typer.Option(help="Numbers of a hidden state. Several give a curve in the plot.")
    ] = field(default_factory=lambda: ["64"])
    heads: Annotated[int, options.count("Heads of each mixer.")] = 1
    lr: Annotated[
        list[str], typer.Option(help="Learning rates; the best one counts. Repeat it, or one list.")
    ] = field(default_factory=lambda: ["1e-2,3e-3"])
    apart: Annotated[
        bool, typer.Option("--apart", help="A model for each setting, not one that learns all of them.")
    ] = False
    all_rates: Annotated[
        bool, typer.Option("--all-rates", help="Go on with the other rates after one that has solved all.")
    ] = False
    seeds: Annotated[list[str], typer.Option(help="Of weights and data. Repeat it, or one list.")] = field(
        default_factory=lambda: ["1"]
    )
    samples: Annotated[
        int, options.count("Sequences of an epoch, of the shortest setting; of the others a fifth each.")
    ] = 8192
    same_data: Annotated[
        bool, typer.Option("--same-data", help="The same sequences in every epoch, as published.")
    ] = False
    epochs: Annotated[int, options.count("Most epochs of a run.")] = 8
    batch_tokens: Annotated[int, options.tokens("Tokens of a step, in whole sequences.")] = 4096
    test_samples: Annotated[int, options.count("Sequences that are tested after each epoch.")] = 500
    dropout: Annotated[float, typer.Option(help="Of embeddings and layers. Published: 0.1.")] = 0.0
    stop: Annotated[float, typer.Option(help="The accuracy that ends a run.")] = 0.99
    device: Annotated[str, typer.Option(help='"cpu", or "cuda".')] = "cpu"
    json: options.Json = False


@dataclass(frozen=True, kw_only=True)
class Mqar(Trained):
    """Options of `farspan eval mqar`."""

    settings: Annotated[
        list[str], typer.Option(help='LENGTHxPAIRS. Repeat it, or one list: "64x4,128x8".')
    ] = field(default_factory=lambda: ["64x4,128x8,256x16"])
    vocabulary: Annotated[int, options.count("Tokens: the first half are keys, the others values.")] = 8192
    filler: Annotated[
        str, typer.Option(help='Tokens between the queries: "zero" (0), or "random" tokens.')
    ] = "zero"
    out: Annotated[Path, _OUT] = Path("out/mqar")


@dataclass(frozen=True, kw_only=True)
class Listops(Trained):
    """Options of `farspan eval listops`."""

    settings: Annotated[
        list[str],
        typer.Option(help='SHORTEST-LONGESTxDEPTHxARGUMENTS. Repeat it, or one list: "4-16x3x4,16-64x4x5".'),
    ] = field(default_factory=lambda: ["4-16x3x4,16-64x4x5"])
    out: Annotated[Path, _OUT] = Path("out/listops")


@options.command
def mqar(given: Mqar) -> None:
    """MQAR (Zoology, arXiv 2312.04927): small models trained from scratch, whose task is to recall.

    Each finished training is a row; the same command goes on where it was stopped. The published sizes are
    --first same --apart --samples 100000 --same-data --epochs 64 --test-samples 3000 --dropout 0.1
    --batch-tokens 32K --lr 1e-4,4.64e-4,2.15e-3,1e-2 --all-rates, for weeks of a CPU.
    """
    from ..evals.mqar.data import Setting

    _compare(given, Setting.parse, vars(given))


@options.command
def listops(given: Listops) -> None:
    """ListOps (Long Range Arena, arXiv 2011.04006): small models trained from scratch, which evaluate
    expressions.

    Each finished training is a row; the same command goes on where it was stopped. The published setting is
    500-2000x10x10.
    """
    from ..evals.mqar.listops import VOCABULARY, ListOps

    _compare(given, ListOps.parse, {**vars(given), "vocabulary": VOCABULARY})


def _compare(given: Mqar | Listops, parse: Callable[[str], Any], values: dict[str, Any]) -> None:
    from ..evals.mqar import layers, report
    from ..evals.mqar.run import Comparison, compare
    from ..evals.mqar.train import Training

    shared = {name: value for name, value in values.items() if name in asdict(Training())}
    comparison = Comparison(
        mixers=layers.split_mixers(given.mixers),
        settings=list(dict.fromkeys(map(parse, options.split_list(given.settings)))),
        dims=options.whole_numbers(given.dim, "--dim"),
        rates=_numbers(given.lr, "--lr", float),
        seeds=_numbers(given.seeds, "--seeds", int),
        apart=given.apart,
        all_rates=given.all_rates,
        training=Training(**shared),
    )
    device, advance = _device(given.device), (lambda said: None) if given.json else output.note
    with output.resumable(given.json):
        summary = compare(comparison, given.out, device=device, advance=advance)
    output.show_summary(summary, report.terminal_table, given.json)


def _numbers(values: list[str], option: str, kind: type[Any]) -> list[Any]:
    try:
        return list(dict.fromkeys(kind(item) for item in options.split_list(values)))
    except ValueError:
        example = "1e-3" if kind is float else "1"
        raise FarspanError(f"{option} takes numbers such as {example}; got {', '.join(values)}.") from None


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(0, device=name).cpu()  # a device without memory, such as meta, refuses this
    except (RuntimeError, AssertionError):
        raise FarspanError(
            f"--device {name} is not there: give cpu, or cuda on a machine with a GPU."
        ) from None
    return name
