"""The files of `farspan inspect`: a picture per layer, one page with everything, and the numbers."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from ..attention.method import PREFILL
from ..runtime.inspect import Inspection
from ..runtime.report import as_bytes, as_percent, as_seconds
from ..runtime.writable import check_writable
from . import pictures

COLUMNS = ("layer", "density", "mass recall", "lowest head", "read to select", "selection", "attention")
PAGE, NUMBERS = "inspect.html", "inspect.json"


def numbers(inspection: Inspection, model: str) -> dict[str, Any]:
    """Everything but the pictures, ready for JSON. Shares are from 0 to 1, seconds are wall-clock time."""
    rows = []
    for layer in inspection.report.layers:
        part = layer.phases[PREFILL]
        assert part.measured is not None
        rows.append(
            {
                "layer": layer.layer,
                "method": part.method,
                "density": part.density,
                "mass_recall": part.measured.recall,
                "mass_recall_by_head": part.measured.head_recall,
                "selection_bytes": part.selection_bytes,
                "selection_seconds": part.measured.selection_seconds,
                "attention_seconds": part.measured.attention_seconds,
            }
        )
    summary = inspection.report.summary
    return {
        "model": model,
        "method": inspection.method,
        "prompt_tokens": inspection.length,
        "density": summary["prefill_density"],
        "mass_recall": summary["prefill_mass_recall"],
        "selection_bytes": summary["selection_bytes"],
        "selection_seconds": summary["prefill_selection_seconds"],
        "attention_seconds": summary["prefill_attention_seconds"],
        "fallbacks": summary["fallbacks"],
        "layers": rows,
        "pictures": [
            {
                "layer": picture.layer,
                "heads": picture.heads,
                "block": picture.block,
                "density": picture.density,
                "mass_recall": picture.recall,
            }
            for picture in inspection.pictures
        ],
        "untouched": {str(layer): why for layer, why in inspection.report.untouched.items()},
    }


def table(data: Mapping[str, Any]) -> list[list[str]]:
    """A row of ``COLUMNS`` per layer, as text, and a last row for all layers."""
    lowest = [min(row["mass_recall_by_head"]) for row in data["layers"]]
    lines = [_line(str(row["layer"]), row, low) for row, low in zip(data["layers"], lowest, strict=True)]
    return [*lines, _line("all", data, min(lowest))]


def _line(name: str, row: Mapping[str, Any], lowest: float) -> list[str]:
    return [
        name,
        as_percent(row["density"]),
        as_percent(row["mass_recall"]),
        as_percent(lowest),
        as_bytes(row["selection_bytes"]),
        as_seconds(row["selection_seconds"]),
        as_seconds(row["attention_seconds"]),
    ]


def check(out: Path) -> None:
    """Check that pictures can be made and that the folder can be written. Raises FarspanError if not."""
    pictures.check_matplotlib()
    check_writable(out, "give another --out")


def write(inspection: Inspection, data: Mapping[str, Any], out: Path) -> list[Path]:
    """Write layer_NN.png for each picture, inspect.html and inspect.json, and return their paths.

    Pictures of an earlier run are removed. Raises FarspanError if the folder cannot be written.
    """
    files, shown = [], []
    with _disk(out):
        out.mkdir(parents=True, exist_ok=True)
        for picture in inspection.pictures:
            path = out / f"layer_{picture.layer:02d}.png"
            with _at_once(path) as scratch:
                pictures.what_was_read(picture, inspection.method, scratch)
            files.append(path)
            shown.append((picture.layer, path.read_bytes()))
        for name, text in (
            (PAGE, page(data, shown)),
            (NUMBERS, json.dumps(data, indent=1, ensure_ascii=False) + "\n"),
        ):
            with _at_once(out / name) as scratch:
                scratch.write_text(text, encoding="utf-8")
            files.append(out / name)
        for old in out.glob("layer_*.png"):
            if re.fullmatch(r"layer_\d{2,}\.png", old.name) and old not in files:
                old.unlink()
    return files


@contextmanager
def _at_once(path: Path) -> Iterator[Path]:
    """A path to write to; at the end it replaces ``path``."""
    scratch = path.with_name(f".{path.name}.part")
    yield scratch
    os.replace(scratch, path)


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FarspanError(f"{out} cannot be written: {error.strerror}; give another --out.") from None


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
tr.all td { font-weight: bold; border-top: 2px solid #888; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: #666; }
dd { margin: 0; }
img { max-width: 100%; height: auto; }
ul { padding: 0; list-style: none; }
.swatch { display: inline-block; width: 1em; height: 1em; vertical-align: -.15em; border: 1px solid #bbb;
          margin-right: .4em; }
"""

_LEGEND = (
    ("#08306b", "read, and much attended to: the method has found it"),
    ("#d0e1f2", "read, with next to no attention: what the method could have saved"),
    ("#67000d", "not read, and much attended to: what the method has missed"),
    ("#ffffff", "not read, with next to no attention: rightly left out"),
    (pictures.HIDDEN, "later than the query: no attention reads it"),
)
_COLOURS = (
    "Queries go down, keys go right, in blocks of {block} tokens. The depth of a colour is the largest true "
    "attention probability in the block, from 0.0001 or less to 1. Blue: the block was read. Red: it was "
    "not. A mixture: it was read in part. A method that picks single keys, or puts keys in another order, "
    "picks the keys that matter out of a block, so a reddish block need not mean a loss. The mass above each "
    "picture says what was lost."
)
_RECALL = (
    "Density: (query, key) pairs read, as a share of those that dense attention reads. Mass recall: the "
    "share of the true softmax attention that falls on the keys read, mean over heads and sampled queries; "
    "lowest head: that of the head that has least. Read to select, selection: bytes and seconds spent on "
    "selecting. Attention: seconds of attention over the selected keys."
)


def page(data: Mapping[str, Any], shown: Sequence[tuple[int, bytes]]) -> str:
    """One HTML page that needs no other file: what was run, the table, the pictures (layer, PNG), a
    legend."""
    method, model = html.escape(data["method"]), html.escape(data["model"])
    spent = data["selection_seconds"] + data["attention_seconds"]
    facts = {
        "model": model,
        "method": f"<code>{method}</code>",
        "prompt": f"{data['prompt_tokens']} tokens",
        "pairs read": f"{as_percent(data['density'])} of what dense attention reads",
        "attention mass read": f"{as_percent(data['mass_recall'])} on sampled queries",
        "cost of selecting": f"{as_seconds(data['selection_seconds'])} of {as_seconds(spent)}, "
        f"{as_bytes(data['selection_bytes'])} read",
    }
    notes = [f"Read everything in {count} layer calls: {why}." for why, count in data["fallbacks"].items()]
    notes += [f"Layer {layer} is not patched: {why}." for layer, why in data["untouched"].items()]
    *lines, total = table(data)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>farspan inspect: {method} on {model}</title><style>{_STYLE}</style></head><body>",
            f"<h1>What <code>{method}</code> read of {data['prompt_tokens']} tokens</h1>",
            "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items()) + "</dl>",
            *(f"<p>{html.escape(note)}</p>" for note in notes),
            "<h2>How to read the pictures</h2>",
            f"<p>{_COLOURS.format(block=data['pictures'][0]['block'])}</p><ul>",
            *(
                f'<li><span class="swatch" style="background:{colour}"></span>{meaning}</li>'
                for colour, meaning in _LEGEND
            ),
            "</ul>",
            *(_figure(layer, png, method) for layer, png in shown),
            "<h2>Every layer</h2>",
            f"<p>{_RECALL}</p>",
            "<table><thead><tr>" + "".join(f"<th>{name}</th>" for name in COLUMNS) + "</tr></thead><tbody>",
            *(_row(line) for line in lines),
            _row(total, ' class="all"'),
            "</tbody></table></body></html>\n",
        ]
    )


def _figure(layer: int, png: bytes, method: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<h2>Layer {layer}</h2><img alt="what {method} read in layer {layer}" '
        f'src="data:image/png;base64,{data}">'
    )


def _row(cells: Sequence[str], of: str = "") -> str:
    return f"<tr{of}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
