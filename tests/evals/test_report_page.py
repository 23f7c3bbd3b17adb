"""The page of a report: what it says, that it is sound HTML, that nothing of a result runs in it, and that a
real browser shows it without an error and without a request."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from farspan import FarspanError
from farspan.evals import export
from farspan.evals.folders import read_folders
from farspan.evals.html.costs import crossing
from farspan.evals.html.page import MOST_BYTES, page

from . import folder

RESULTS = Path(__file__).parents[2] / "docs" / "results"
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> $\\frac{$ ``` | --> ]]>"
VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RULER with an answer and a method that are HTML, needle, perplexity, speed, and an inspected prompt."""
    out = tmp_path_factory.mktemp("folders")
    layers = {"layers": {"prefill": 1.0, "decode": [1.0, 0.2, 0.1]}}
    rows = [folder.row("dense", task, i, 1.0, answer=EVIL) for task in ("vt", "fwe") for i in range(40)]
    rows += [
        folder.row(method, task, i, float(i > 0), answer=EVIL, question=EVIL, **layers)
        for method in ("quest:k=1024", EVIL)
        for task in ("vt", "fwe")
        for i in range(40)
    ]
    folder.write(out / "ruler", rows, recipes={"quest:k=1024": "ab"}, model="tiny")
    needle = [
        folder.row("dense", "needle", 0, score, suite="needle", key=f"needle/{depth}", extra={"depth": depth})
        for depth, score in ((0.0, 1.0), (0.5, 0.0))
    ]
    folder.write(out / "needle", needle, suite="needle")
    ppl = [
        folder.row(m, "text", i, 0.0, suite="ppl") | {"score": None}
        for m in ("dense", "quest:k=1024")
        for i in range(6)
    ]
    folder.write(out / "ppl", ppl, suite="ppl")
    seconds = {"unpatched": {1024: 1.0, 4096: 4.0}, "quest:k=1024": {1024: 2.0, 4096: 2.0}}
    rows = [folder.speed_row(m, n, s, 5.0) for m, by_length in seconds.items() for n, s in by_length.items()]
    folder.write(out / "speed", rows, **folder.SPEED)
    (out / "look").mkdir()
    layer = {"layer": 0, "density": 0.2, "mass_recall": 0.9}
    look = {
        "model": "tiny",
        "method": "antidiagonal",
        "prompt_tokens": 99,
        "density": 0.2,
        "mass_recall": 0.9,
    }
    (out / "look" / "inspect.json").write_text(json.dumps(look | {"layers": [layer, layer | {"layer": 1}]}))
    return out


@pytest.fixture(scope="module")
def html(folders: Path) -> str:
    return page(read_folders([folders]))


class Outline(HTMLParser):
    """What a page is made of; `handle_*` check that every element is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, Any]]] = []
        self.headings: list[int] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_headline_says_what_was_measured(html: str) -> None:
    text = " ".join(Outline(html).text.split())
    assert (
        "quest:k=1024 keeps 98 % ± 5 of dense at 4K (ruler, 2 tasks, 80 prompts), reads 25 % of the keys in"
        in text
    )
    assert "first token 2.0× sooner on this machine (a CPU, 2 threads)." in text
    assert "It is at most 10 points below dense with 95 % confidence." in text
    assert 'farspan.patch(model, "quest:k=1024", recipe=RECIPE)' in text
    assert "Nothing was measured with this model beyond 4,096 tokens." in text


def test_texts_of_results_are_text(html: str) -> None:
    outline = Outline(html)
    assert not outline.tags["script"] and not outline.tags["img"] and not outline.tags["iframe"]
    assert outline.text.count("<script>alert('x')</script>") > 20
    assert not [name for _, attributes in outline.attributes for name in attributes if name.startswith("on")]


def test_the_page_is_sound_and_accessible(html: str) -> None:
    outline = Outline(html)
    found = outline.attributes
    assert [outline.tags[tag] for tag in ("main", "nav", "header", "footer", "h1", "title")] == [1] * 6
    assert outline.headings[0] == 1
    steps = zip(outline.headings, outline.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps), "no level is left out"
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for tag, a in found if tag == "a"] + [
        a["aria-labelledby"] for _, a in found if "aria-labelledby" in a
    ]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert all(a.get("scope") in ("col", "row") for tag, a in found if tag == "th")
    assert outline.tags["table"] == outline.tags["caption"]
    assert all(a.get("aria-label") for tag, a in found if tag == "svg" and a.get("role") == "img")
    assert outline.tags["svg"] >= 7
    outside = [v for _, a in found for name, v in a.items() if name in ("src", "href", "xlink:href") and v]
    assert all(value.startswith(("#", "data:")) for value in outside), "no request"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_the_contrast_that_text_needs() -> None:
    """4.5 to 1 for text (WCAG 2.2, AA), 3 to 1 for lines, in the light theme and in the dark one."""
    css = (Path(export.__file__).parent / "html" / "report.css").read_text()
    for theme in css.split("prefers-color-scheme: dark"):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme))
        pairs = [
            ("ink", "ground", 4.5),
            ("dim", "ground", 4.5),
            ("accent", "ground", 4.5),
            ("ink", "soft", 4.5),
        ]
        pairs += [("dim", "soft", 4.5), ("dim", "unsure", 4.5), ("ink", "good", 4.5), ("ink", "bad", 4.5)]
        pairs += [(f"series-{number}", "ground", 3) for number in range(1, 9)]
        for one, other, least in pairs:
            low, high = sorted(luminance(colours[name]) for name in (one, other))
            assert (high + 0.05) / (low + 0.05) >= least, (one, other)


def test_every_part_is_there(html: str) -> None:
    text = Outline(html).text
    for part in (
        "Needle by depth",
        "Perplexity of tiny",
        "Keys read in percent by layer",
        "attention mass on them",
    ):
        assert part in text, part
    assert "about 2,048 tokens (between 1K and 4K)" in text
    assert "farspan eval ruler --model tiny --dtype float32 --methods" in text


@pytest.mark.parametrize(
    "ratios, says",
    [
        ([(1024, 0.5), (4096, 2.0)], "about 2,048 tokens (between 1K and 4K)"),
        ([(1024, 1.5), (4096, 2.0)], "at every measured length, from 1K on"),
        ([(1024, 1.5), (4096, 0.9)], "not up to 4K, the longest measured"),
        ([(1024, 0.9)], "not up to 1K, the longest measured"),
        ([], "not measured"),
    ],
)
def test_break_even(ratios: list[tuple[int, float]], says: str) -> None:
    assert crossing(ratios) == says


def test_the_committed_results_make_a_page_within_its_size(tmp_path: Path) -> None:
    """Rows without a question: the sample is made again from its recipe."""
    text = page(read_folders([RESULTS / "ruler_long", RESULTS / "needle_long"]))
    Outline(text)
    assert len(text.encode()) < MOST_BYTES
    assert "special magic number" in text and "A right answer contains" in text


def test_the_committed_page_is_a_sound_report() -> None:
    """docs/report.html, as `make report` writes it."""
    text = (RESULTS.parent / "report.html").read_text()
    outline = Outline(text)
    assert len(text.encode()) <= MOST_BYTES and outline.headings[0] == 1
    for name in ("ruler_long", "ruler_prefill", "needle_long", "mqar"):
        assert name in outline.text, f"{name} is missing: run `make report`"


def test_other_forms(folders: Path, tmp_path: Path) -> None:
    import pandas

    found = read_folders([folders])
    for name in ("a.md", "a.csv", "a.parquet"):
        export.write(found, tmp_path / name)
    rows = sum(len(one.rows) for one in found.evaluations)
    table, same = pandas.read_csv(tmp_path / "a.csv"), pandas.read_parquet(tmp_path / "a.parquet")
    assert len(table) == len(same) == rows and list(table.columns) == list(same.columns)
    quest = same[(same.method == "quest:k=1024") & (same.suite == "ruler")]
    assert quest.score.mean() == pytest.approx(78 / 80) and set(quest.decode_density) == {0.25}
    text = (tmp_path / "a.md").read_text()
    assert "**tiny, ruler, 4K tokens**: `quest:k=1024` keeps 98 %" in text and "<script" not in text


@pytest.mark.parametrize(
    "name, says",
    [
        ("a.pdf", r"ends in \.html, \.md, \.csv, \.parquet"),
        ("folder.html", "is a folder"),
        ("file/a.html", "cannot be written"),
        ("/proc/a.html", "cannot be written"),
    ],
)
def test_targets_that_cannot_be_written(folders: Path, tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FarspanError, match=says) as caught:
        export.write(read_folders([folders / "speed"]), tmp_path / name)
    assert "\n" not in str(caught.value)


FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--window-size=900,1400",
)


def browsed(file: Path, folder: Path) -> tuple[list[str], list[str], Path]:
    """The console messages and the requests of a page in a headless Chromium, and its screenshot."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed (apt-get install chromium): the page is not tried in a browser")
    log, shot = folder / "net.json", folder / "shot.png"
    own = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", f"--screenshot={shot}"]
    done = subprocess.run([browser, *FLAGS, *own, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and shot.exists(), done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    ours = [
        params["url"] for params in asked if params["initiator"] != "not an origin"
    ]  # not the browser's own
    return console, sorted({url for url in ours if not url.startswith(("file:", "data:"))}), shot


def test_a_browser_shows_it_without_an_error_or_a_request(html: str, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "report.html").write_text(html)
    console, urls, shot = browsed(tmp_path / "report.html", tmp_path)
    assert console == [] and urls == []
    colours = Image.open(shot).convert("RGB").getcolors(1 << 24)
    assert colours is not None and len(colours) > 50, "the screenshot is not empty"
    # The same look at a page that has both: the test can fail.
    bad = "<!DOCTYPE html><script>console.error('fault')</script><img src='http://example.invalid/a.png'>"
    (tmp_path / "bad.html").write_text(bad)
    console, urls, _ = browsed(tmp_path / "bad.html", tmp_path)
    assert any("fault" in line for line in console) and "http://example.invalid/a.png" in urls
