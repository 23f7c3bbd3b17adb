"""`farspan report`, `recommend` and `sweep` at the command line, and `farspan.evaluate` beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import farspan
from farspan.evals.results import read
from farspan.evals.sample import Sample
from farspan.evals.task import Task, filled
from farspan.evals.tokens import Filling

from . import folder

Command = Callable[..., tuple[int, str, str]]


def test_recommend_prints_a_line_to_paste(tmp_path: Path, farspan_command: Command) -> None:
    rows = [folder.row(m, "vt", i, 1.0) for m in ("dense", "quest:k=64") for i in range(60)]
    folder.write(tmp_path, rows, recipes={"quest:k=64": "ab"})
    code, out, err = farspan_command("recommend", str(tmp_path), "--max-drop", "10")
    assert (code, err) == (0, "")
    assert 'farspan.patch(model, "quest:k=64", recipe=RECIPE)' in out and "1 task" in out
    code, out, _ = farspan_command("recommend", str(tmp_path), "--max-drop", "10", "--json")
    assert code == 0 and json.loads(out)[0]["chosen"]["method"] == "quest:k=64"
    code, out, _ = farspan_command("recommend", str(tmp_path))
    assert code == 1 and "Not ruled out" in out and "times as many prompts" in out
    code, _, err = farspan_command("recommend", str(tmp_path), "--length", "32K")
    assert code == 2 and "Nothing was measured at 32768 tokens, only at 4096" in err
    code, out, _ = farspan_command(
        "recommend", str(tmp_path), "--length", "32K", "--extrapolate", "--max-drop", "10"
    )
    assert code == 0 and "32K (extrapolated from 4K)" in out and "Nothing was measured at 32K" in out


def test_a_report_in_every_form(tmp_path: Path, farspan_command: Command) -> None:
    folder.write(tmp_path / "a", [folder.row(m, "vt", i, 1.0) for m in ("dense", "quest") for i in range(6)])
    names = [tmp_path / "new" / name for name in ("a.html", "a.md", "a.csv", "a.parquet")]
    code, out, err = farspan_command(
        "report", str(tmp_path / "a"), *(word for n in names for word in ("-o", str(n)))
    )
    assert (code, out) == (0, "") and err.count("Written: ") == 4
    assert all(name.stat().st_size > 500 for name in names)
    assert "<title>farspan report: tiny</title>" in names[0].read_text()


@pytest.mark.parametrize(
    "words, says",
    [
        (["report", "{here}", "-o", "a.pdf"], "give a name that ends in .html, .md, .csv, .parquet"),
        (["report", "{here}/none", "-o", "a.md"], "none is not there"),
        (["report", "{here}", "-o", "/proc/a.md"], "/proc/a.md cannot be written"),
        (["report", "{here}", "-o", "a.md", "--confidence", "2"], "--confidence 2 was given"),
        (["recommend", "{here}", "--max-drop", "-1"], "--max-drop -1 was given"),
        (["recommend", "{here}", "--by", "money"], "--by money was given"),
        (["sweep", "{here}/none.yaml"], "none.yaml cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, farspan_command: Command, words: list[str], says: str
) -> None:
    folder.write(tmp_path, [folder.row(m, "vt", 0, 1.0) for m in ("dense", "quest")])
    code, out, err = farspan_command(*(word.format(here=tmp_path) for word in words))
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err


def test_a_sweep_of_a_model_on_the_disk(tmp_path: Path, tiny_folder: Path, farspan_command: Command) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("It rained in the morning and the river rose. " * 400)
    path = tmp_path / "sweep.yaml"
    grid = f"suite: needle, models: ['{tiny_folder}'], text: '{text}', lengths: [256], depths: [0, 1]"
    more = "samples: 1, methods: [dense, 'window:w=32'], folder: needle"
    path.write_text(f"out: {tmp_path}/out\ngrids:\n  - {{{grid}, {more}}}\n")
    # `farspan eval` has begun the folder: its settings are the sweep's, and its rows are not made again.
    words = [
        "--model",
        str(tiny_folder),
        "--text",
        str(text),
        "--lengths",
        "256",
        "--depths",
        "0",
        "--samples",
        "1",
    ]
    begun = [
        "eval",
        "needle",
        *words,
        "--methods",
        "dense; window:w=32",
        "--out",
        str(tmp_path / "out" / "needle"),
    ]
    assert farspan_command(*begun)[0] == 0
    code, out, err = farspan_command("sweep", str(path))
    assert code == 0 and "needle/needle/256/depth=1 is done, 2 of 2 cells." in err, err
    assert "depth=0 is done" not in err
    assert "window:w=32" in out and len(read(tmp_path / "out" / "needle")[1]) == 4
    before = (tmp_path / "out" / "needle" / "samples.jsonl").read_bytes()
    code, _, err = farspan_command("sweep", str(path))
    assert code == 0 and "is done" not in err, "nothing is done again"
    path.write_text(path.read_text().replace("samples: 1", "samples: 1, seed: 2"))
    code, _, err = farspan_command("sweep", str(path))
    assert code == 2 and "seed 1 there, 2 here" in err
    assert (tmp_path / "out" / "needle" / "samples.jsonl").read_bytes() == before


@dataclass(frozen=True, kw_only=True)
class Letters(Task):
    """A question whose answer is one letter."""

    suite: ClassVar[str] = "letters"

    def make(self, tokenizer: Any, name: str, length: int, count: int) -> Iterator[Sample]:
        filling = Filling(tokenizer)
        for index in range(count):
            yield filled(filling, lambda units, i=index: self.sample(name, length, i, units), what=name)

    def sample(self, name: str, length: int, index: int, units: int) -> Sample:
        return Sample(
            suite=self.suite,
            task=name,
            length=length,
            index=index,
            seed=self.seed,
            context="a b c. " * units,
            question="Which?",
            answer_prefix="",
            references=("ab"[index % 2],),
            gold=" a",
            max_new_tokens=2,
            recipe={"index": index},
            extra={},
        )


def test_a_task_of_ones_own(tmp_path: Path, tiny_folder: Path) -> None:
    model, tokenizer = farspan.load(str(tiny_folder))
    task = Letters(lengths=[128], samples=2)
    given: dict[str, Any] = {"out": tmp_path / "own", "progress": False}
    result = farspan.evaluate(model, tokenizer, ["dense", "window:w=16"], suite=task, **given)
    assert result.complete and len(result.rows) == 4
    frame = result.to_pandas()
    assert set(frame.method) == {"dense", "window:w=16"}
    assert set(frame.key) == {f"letters/letters/128/{i}" for i in (0, 1)}
    assert "letters ·" in str(result)
    result.report(tmp_path / "own.html")
    assert "Which?" in (tmp_path / "own.html").read_text()
    with pytest.raises(farspan.FarspanError, match="at least"):
        farspan.evaluate(model, tokenizer, ["dense"], suite=Letters(lengths=[4]), **given)


def test_the_other_suites_from_python(tmp_path: Path, tiny_folder: Path) -> None:
    model, tokenizer = farspan.load(str(tiny_folder))
    text = tmp_path / "prose.txt"
    text.write_text("It rained in the morning and the river rose. " * 400)
    given: dict[str, Any] = {
        "lengths": [128],
        "samples": 1,
        "text": str(text),
        "new_tokens": 4,
        "progress": False,
    }
    methods = ["dense", "window:w=16"]
    for suite, more, rows in (
        ("needle", {"depths": [0.5]}, 2),
        ("fidelity", {"prompts": ["a river"]}, 2),
        ("ppl", {}, 2),
        ("speed", {"repeats": 1}, 3),
    ):
        result = farspan.evaluate(
            model, tokenizer, methods, suite=suite, out=tmp_path / suite, **given, **more
        )
        assert len(result.rows) == rows and str(result).startswith(f"{suite} ·")
        long = more | {"lengths": [8192]} | ({"prompts": ["a river " * 4096]} if suite == "fidelity" else {})
        with pytest.raises(farspan.FarspanError, match=r"tokens, but .* has 2048 positions"):
            farspan.evaluate(model, tokenizer, methods, suite=suite, **(given | long))
    with pytest.raises(farspan.FarspanError, match="it is one of ruler, needle, retrieval, turns, fid"):
        farspan.evaluate(model, tokenizer, methods, suite="other")
