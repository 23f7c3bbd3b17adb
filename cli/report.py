"""`farspan report` and `farspan recommend`: what result folders say, as a page and as one line to paste."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import launch, options, output

Folders = Annotated[
    list[Path],
    typer.Argument(metavar="DIR...", help="Output folders of `farspan eval`, or folders above them."),
]
MaxDrop = Annotated[float, typer.Option(help="Points of score, of 100, that a method may lose to dense.")]
Confidence = Annotated[float, typer.Option(help="How sure that is, for each method: from 0.5 to below 1.")]


def report(
    folders: Folders,
    out: Annotated[
        list[Path],
        typer.Option(
            "--out", "-o", help="What to write, by its suffix: .html, .md, .csv or .parquet. Repeat it."
        ),
    ],
    title: Annotated[str, typer.Option(help="The heading [default: the models' names].")] = "",
    max_drop: Annotated[
        float | None,
        typer.Option(help="The loss in points for which a method is named [default: 1, 2, 5 and 10]."),
    ] = None,
    confidence: Confidence = 0.95,
) -> None:
    """Write what result folders say: one HTML page that opens from the disk, Markdown, or their rows.

    The page says which method keeps how much of dense's score, what it reads, and how sure that is, with
    plots, tables, samples and the commands that made it. Folders of `farspan eval speed` and `farspan
    inspect` add speed and what each layer reads.
    """
    launch.only_rank_0()
    from ..evals import export
    from ..evals.folders import read_folders
    from ..evals.html.view import DROPS
    from ..evals.recommend import check_bounds

    export.check(out)
    check_bounds(max_drop or 0.0, confidence)
    found = read_folders(folders)
    drops = DROPS if max_drop is None else (max_drop,)
    for target in out:
        export.write(found, target, drops=drops, confidence=confidence, title=title)
        output.note(f"Written: {target}")


def recommend(
    folders: Folders,
    max_drop: MaxDrop = 1.0,
    confidence: Confidence = 0.95,
    length: Annotated[
        int | None, options.tokens("The length that you need [default: the longest measured].")
    ] = None,
    by: Annotated[
        str, typer.Option(help='What is cheap: "keys" read, or the "seconds" of an answer, where measured.')
    ] = "keys",
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Answer from the nearest length that was measured.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Print the cheapest method whose loss against dense is within a bound, and what was not ruled out.

    The loss is measured prompt by prompt beside dense. Exit code 1: no method is shown to be within the
    bound.
    """
    launch.only_rank_0()
    from ..evals.folders import read_folders
    from ..evals.recommend import recommend as choose

    found = read_folders(folders)
    wanted: dict[str, Any] = {"length": length, "by": by, "extrapolate": extrapolate}
    every = choose(found, max_drop=max_drop, confidence=confidence, **wanted)
    if json:
        output.show_json([one.to_dict() for one in every])
    else:
        from ..evals.words import recommendation

        for one in every:
            output.show_text(recommendation(one))
    if not any(one.chosen for one in every):
        raise typer.Exit(1)
