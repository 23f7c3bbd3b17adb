"""farspan inspect: pictures against brute force, the page, and numbers that are the report's."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import farspan
from farspan import FarspanError, SpecError
from farspan.cli import main
from farspan.evals import inspect as files
from farspan.evals import pictures
from farspan.runtime.inspect import inspect
from farspan.runtime.models import encode_prompt, load

PBS = "pbs:mass=0.5,block=16,segment=32"
LENGTH = 150


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=6, initializer_range=0.2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama, smollm2_tokenizer) -> Path:
    """A random six-layer model with SmolLM2's tokenizer and 512 positions, and a prompt."""
    folder = tmp_path_factory.mktemp("inspect")
    tiny_llama(
        vocab_size=49152, max_position_embeddings=512, num_hidden_layers=6, initializer_range=0.2
    ).save_pretrained(folder / "tiny")
    smollm2_tokenizer.save_pretrained(folder / "tiny")
    (folder / "prompt.txt").write_text("It rained in the morning and <b>the river</b> rose & fell. " * 15)
    (folder / "long.txt").write_text("It rained in the morning and the river rose. " * 100)
    return folder


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return ended.value.code or 0, *capsys.readouterr()

    return run


def blocks(x: torch.Tensor, size: int, how: str) -> torch.Tensor:
    """[H, T, T] pooled over blocks, one at a time."""
    n = -(-x.shape[1] // size)
    out = torch.zeros(x.shape[0], n, n, dtype=x.dtype)
    for i in range(n):
        for j in range(n):
            part = x[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
            out[:, i, j] = part.amax((1, 2)) if how == "max" else part.sum((1, 2))
    return out


# --- the data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 50])
def test_the_attention_of_a_picture_is_the_models_own(model, ids, size):
    """transformers' eager attention writes out every probability; under dense the layers' inputs are its."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            probabilities = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    found = inspect(model, ids, "dense", block=size)
    assert [p.layer for p in found.pictures] == [0, 2, 3, 5]
    for picture in found.pictures:
        assert picture.heads == [0, 1, 3, 4, 6, 7]
        want = blocks(probabilities[picture.layer][0, picture.heads], size, "max")
        torch.testing.assert_close(picture.attention, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(picture.read, (want > 0).float())
        assert picture.density == picture.recall == [1.0] * 6


def test_what_a_picture_shows_as_read(model, ids):
    found = inspect(model, ids, "window:w=20,sinks=3", layers=[1], heads=[2, 5], block=16)
    rows, cols = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    causal = cols <= rows
    mask = causal & ((cols > rows - 20) | (cols < 3))
    visible, read = (blocks(x[None].long(), 16, "sum")[0] for x in (causal, mask))
    [picture] = found.pictures
    want = torch.where(visible > 0, read / visible.clamp(min=1), 0.0)
    assert torch.equal(picture.read, want.expand(2, -1, -1))
    assert picture.density == pytest.approx([int(mask.sum()) / int(causal.sum())] * 2)


@pytest.mark.parametrize(
    "spec", [PBS, "pbs:mass=0.5,block=16,segment=32,gqa_reduce=sum", "block_topk:k=32,block=16"]
)
def test_reordered_keys_are_drawn_where_they_stand(model, ids, spec):
    """By whole pairs, heads and layers the pictures add up to what the report has counted."""
    found = inspect(model, ids, spec, layers=range(6), heads=range(8), block=16)
    counts = blocks(torch.ones(LENGTH, LENGTH).tril()[None], 16, "sum")[0]
    for picture, layer in zip(found.pictures, found.report.layers, strict=True):
        part = layer.phases["prefill"]
        pairs = picture.read.double() * counts
        assert round(float(pairs.sum())) == part.pairs
        assert float((pairs - pairs.round()).abs().max()) < 1e-4, "whole pairs"
        assert sum(picture.density) / 8 == pytest.approx(part.density)
        assert picture.recall == part.measured.head_recall
        assert 0 < part.density < 0.8


def test_the_report_is_that_of_a_patch(model, ids):
    found = inspect(model, ids, PBS, rows=7)
    with farspan.patch(model, prefill=PBS, measure_mass=7) as patched, torch.no_grad():
        model(ids)
        want = patched.report(measure_mass=True)
    for a, b in zip(found.report.layers, want.layers, strict=True):
        a, b = a.phases["prefill"], b.phases["prefill"]
        assert (a.density, a.measured.rows) == (b.density, 7)
        assert a.measured.head_recall == b.measured.head_recall
        assert a.selection_bytes == b.selection_bytes


def test_a_prompt_shorter_than_a_block(model, ids):
    found = inspect(model, ids[:, :10], "window:w=2,sinks=1", layers=[0], heads=[0])
    [picture] = found.pictures
    assert picture.read.shape == (1, 1, 1) and found.report.layers[0].phases["prefill"].measured.rows == 10
    assert picture.read.item() == pytest.approx((1 + 2 + 8 * 3) / 55)
    assert picture.density == pytest.approx([27 / 55])


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ({"layers": [6]}, FarspanError, "no layer 6: the model has layers 0 to 5"),
        ({"layers": [-1]}, FarspanError, "no layer -1"),
        ({"heads": [0, 8]}, FarspanError, "no head 8: the model has heads 0 to 7"),
        ({"heads": []}, FarspanError, "No head was given"),
        ({"block": 0}, FarspanError, "blocks of 1 to 150 tokens; got 0"),
        ({"block": 151}, FarspanError, "blocks of 1 to 150 tokens; got 151"),
        ({"spec": "quest:k=16"}, SpecError, "quest leaves prefill dense"),
        (
            {"ids": torch.ones(2, 9, dtype=torch.long)},
            FarspanError,
            r"one prompt, \[1, T\] with at least one token; got \[2, 9\]",
        ),
    ],
)
def test_what_cannot_be_looked_at(model, ids, how, kind, says):
    how = {"ids": ids, "spec": "dense"} | how
    with pytest.raises(kind, match=says) as error:
        inspect(model, how.pop("ids"), how.pop("spec"), **how)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert not farspan.runtime.hf.is_patched(model)


# --- the files -------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would find: balanced tags, what is loaded, the cells of the table, the text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "object")
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def picture(path: Path) -> torch.Tensor:
    from matplotlib.image import imread

    return torch.from_numpy(imread(path))


def test_the_command(command, folder, tmp_path):
    out = tmp_path / "new" / "out"
    arguments = ["inspect", "--model", str(folder / "tiny"), "--method", PBS, "--out", str(out)]
    arguments += ["--prompt-file", str(folder / "prompt.txt"), "--no-chat"]
    code, text, err = command(*arguments, "--layers", "4,1", "--heads", "0,7", "--json")
    assert code == 0, err
    data = json.loads(text)
    names = ["layer_01.png", "layer_04.png", "inspect.html", "inspect.json"]
    assert data.pop("files") == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert json.loads((out / "inspect.json").read_text()) == data

    tiny, tokenizer = load(folder / "tiny")
    ids = encode_prompt(tokenizer, (folder / "prompt.txt").read_text(), chat=False)
    with farspan.patch(tiny, prefill=PBS, measure_mass=True) as patched, torch.no_grad():
        tiny(ids)
        report = patched.report(measure_mass=True)
    assert data["prompt_tokens"] == ids.shape[1]
    assert data["density"] == report.summary["prefill_density"]
    assert data["mass_recall"] == report.summary["prefill_mass_recall"]
    assert data["selection_bytes"] == report.summary["selection_bytes"] > 0
    assert data["selection_seconds"] > 0 and data["attention_seconds"] > 0
    for row, layer in zip(data["layers"], report.layers, strict=True):
        part = layer.phases["prefill"]
        assert row["density"] == part.density < 0.8
        assert row["mass_recall"] == part.measured.recall
        assert row["mass_recall_by_head"] == part.measured.head_recall
    assert [p["layer"] for p in data["pictures"]] == [1, 4]
    assert data["pictures"][1]["mass_recall"] == [data["layers"][4]["mass_recall_by_head"][h] for h in (0, 7)]

    html = (out / "inspect.html").read_text()
    rest = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert "http" not in rest and "//" not in rest and "@import" not in rest and "url(" not in rest
    page = Page(html)
    assert page.loaded == [
        "data:image/png;base64," + base64.b64encode((out / name).read_bytes()).decode() for name in names[:2]
    ]
    assert page.rows[0] == list(files.COLUMNS)
    assert page.rows[1:] == files.table(data) and len(page.rows) == 8
    assert page.rows[3][:3] == [
        "2",
        f"{100 * data['layers'][2]['density']:.1f} %",
        f"{100 * data['layers'][2]['mass_recall']:.1f} %",
    ]
    for part in (PBS, str(folder / "tiny"), f"{ids.shape[1]} tokens", "Layer 1", "Layer 4"):
        assert part in page.text
    for name in names[:2]:
        shape = picture(out / name).shape
        assert min(shape[:2]) > 400 and shape[2] in (3, 4)

    (out / "layer_2.png").write_text("not one of ours")
    code, text, err = command(*arguments[:-3], "-p", "-", "--layers", "4", stdin="It rained. " * 80)
    assert code == 0, err
    assert sorted(path.name for path in out.iterdir()) == sorted([*names[1:], "layer_2.png"])
    assert max(map(len, text.splitlines())) <= 80
    for part in ("layer", "density", "recall", "select", "all"):
        assert part in text
    assert str(out / "inspect.html") in err.replace("\n", "")


def test_a_spec_and_a_name_are_text_on_the_page(model, ids):
    found = inspect(model, ids, "dense", layers=[0], heads=[0])
    page = Page(files.page(files.numbers(found, "<script>a&b"), []))
    assert "<script>a&b" in page.text


def test_what_is_said_where_everything_was_read(model, ids):
    found = inspect(model, ids, "block_topk:k=512", layers=[0], heads=[0])
    data = files.numbers(found, "tiny")
    assert data["fallbacks"] == {"the budget covers the length": 6}
    assert data["mass_recall"] == data["density"] == 1.0
    assert (
        "Read everything in 6 layer calls: the budget covers the length." in Page(files.page(data, [])).text
    )


def test_blue_is_read_red_is_missed_and_deeper_is_more():
    attention = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1e-5, 1e-5, 0.01]])
    read = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    red, _, blue = (torch.from_numpy(x) for x in pictures._coloured(attention, read).transpose(2, 0, 1))
    assert bool((blue[0, 0] > red[0, 0]) & (red[1, 0] > blue[1, 0]))
    assert float(red[2, 1]) == float(blue[2, 1]) == 1.0, "left out and not missed: white"
    assert red[0, 0] < red[2, 2] < red[2, 0] < 1, "read: the paler the less attention, never white"
    assert float(red[0, 1]) == pytest.approx(0xE9 / 255), "what no query sees"


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--layers", "6"], ["There is no layer 6", "layers 0 to 5"]),
        (["--heads", "1,9"], ["There is no head 9", "heads 0 to 7"]),
        (["--layers", "first"], ["--layers takes whole numbers from 0 on", "'first'"]),
        (["--recipe", "/no/such"], ["A recipe was given, but no method needs one (pbs)"]),
        (["--method", "sale"], ["sale needs a recipe"]),
        (
            ["--method", "sale", "--recipe", "/no/such"],
            ["There is no recipe at /no/such", "farspan calibrate"],
        ),
        (["--heads", "-1"], ["--heads takes whole numbers from 0 on", "'-1'"]),
        (["--block", "100000"], ["blocks of 1 to", "got 100000"]),
        (["--method", "pbbs"], ["no method 'pbbs'", "did you mean 'pbs'"]),
        (["--method", "quest"], ["quest leaves prefill dense"]),
        (["--prompt-file", "/no/such.txt"], ["/no/such.txt cannot be read"]),
        (["--prompt-file", "{folder}/long.txt"], ["positions", "--rope yarn:3"]),
        (["--model", "./nowhere"], ["no folder or file './nowhere'"]),
        (["--out", "{folder}/prompt.txt"], ["prompt.txt cannot be written", "another --out"]),
        (["--out", "/proc/nothing"], ["/proc/nothing cannot be written", "another --out"]),
        (["-p", "x"], ["Both --prompt and --prompt-file were given"]),
    ],
)
def test_bad_input_ends_in_one_sentence(command, folder, tmp_path, arguments, parts):
    given = {
        "--model": str(folder / "tiny"),
        "--method": "pbs",
        "--prompt-file": str(folder / "prompt.txt"),
        "--out": str(tmp_path / "out"),
    }
    given |= {
        name: value.format(folder=folder) for name, value in zip(arguments[::2], arguments[1::2], strict=True)
    }
    code, out, err = command("inspect", *(word for pair in given.items() for word in pair))
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("farspan: ") and lines[0].endswith("."), err
    for part in parts:
        assert part in lines[0]
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_is_said_before_the_model_is_loaded(command, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("farspan.cli.options.load_model", lambda *_, **__: pytest.fail("loaded"))
    where = ["--prompt-file", str(folder / "prompt.txt"), "--out", str(tmp_path / "out")]
    code, _, err = command("inspect", "--method", "pbs", *where)
    assert code == 2 and "needs matplotlib: pip install 'farspan[evals]'" in err
    assert not (tmp_path / "out").exists()
