"""`farspan eval ppl` and `speed` at the command line: their options, and how they go on after a stop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farspan.cli import main
from farspan.evals import speed as speed_module

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, smollm2_tokenizer: Any) -> Path:
    """Two random models of one architecture with SmolLM2's tokenizer, and prose beside them."""
    folder = tmp_path_factory.mktemp("commands")
    for seed, name in enumerate(("chat", "next")):
        tiny_llama(vocab_size=49152, seed=seed).save_pretrained(folder / name)
        smollm2_tokenizer.save_pretrained(folder / name)
    (folder / "prose.txt").write_text("It rained in the morning and the river rose. " * 400)
    return folder


@pytest.fixture
def command(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `farspan eval SUITE` on the folder's text, in the folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")

    def run(suite: str, *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["eval", suite, "--text", "prose.txt", *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


PPL = ("--model", "chat", "--new-tokens", "16", "--samples", "2", "--methods", "dense; window:w=32")


def test_ppl_takes_several_lengths_and_prints_perplexities(command: Command, tmp_path: Path) -> None:
    code, out, err = command("ppl", *PPL, "--lengths", "200,300", "--out", str(tmp_path), "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2
    for line in json.loads(out)["overall"]:
        nlls = [r["nll"] for r in rows if (r["method"], r["length"]) == (line["method"], line["length"])]
        assert len(nlls) == 2 and line["perplexity"] == pytest.approx(math.exp(sum(nlls) / 2))
    code, table, err = command("ppl", *PPL, "--lengths", "200,300", "--out", str(tmp_path))
    assert code == 0 and "perplexity" in table and "score" not in table, err
    for line in json.loads(out)["overall"]:
        assert f" {line['perplexity']:.2f} " in table


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--lengths", "1"),
            "The length 1 is too short to score its last 16 tokens: a window takes at least 18",
        ),
        (("--lengths", "17"), "The length 17 is too short"),
        (("--context", "200,300"), "--context is not an option of this command; give --lengths"),
        (("--tokens", "9"), "--tokens is not an option of this command; give --new-tokens."),
        (("--windows", "9"), "--windows is not an option of this command; give --samples."),
    ],
)
def test_ppl_says_what_to_give_instead(command: Command, tmp_path: Path, arguments: Any, says: str) -> None:
    code, out, err = command("ppl", *PPL, *arguments, "--out", str(tmp_path / "x"))
    assert (code, out) == (2, "") and err.startswith(f"farspan: {says}") and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists()


def test_one_vocabulary(command: Command) -> None:
    shown = {suite: command(suite, "--help")[1] for suite in ("ruler", "needle", "ppl", "speed")}
    for option in ("--lengths", "--methods", "--out"):
        assert all(option in text for text in shown.values()), option
    assert all("--samples" in shown[suite] for suite in ("ruler", "needle", "ppl"))
    assert all("--new-tokens" in shown[suite] for suite in ("ppl", "speed"))
    assert not any(old in shown["ppl"] for old in ("--context", "--windows"))


SPEED = ("--lengths", "128", "--new-tokens", "4", "--repeats", "2", "--methods", "dense; window:w=32")


def test_speed_stops_in_a_sentence_and_goes_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = speed_module.Timer.once, []

    def once(self: Any, spec: str, prompts: Any, count: int) -> Any:
        calls.append(spec)
        if len(calls) == 3 + 2:  # after the warm-up and one measurement
            raise KeyboardInterrupt
        return real(self, spec, prompts, count)

    monkeypatch.setattr(speed_module.Timer, "once", once)
    use = (*SPEED, "--model", "chat", "--out", str(tmp_path))
    code, out, err = command("speed", *use)
    assert (code, out) == (130, "")
    assert err.strip() == "Stopped; what was finished is kept. Run the same command to go on."
    lines = (tmp_path / "samples.jsonl").read_text()
    assert lines.count("\n") == 1
    code, table, err = command("speed", *use)
    assert code == 0 and "unpatched" in table and "window:w=32" in table, err
    whole = (tmp_path / "samples.jsonl").read_text()
    assert whole.startswith(lines) and whole.count("\n") == 2 * 3 + 1
    calls.clear()
    code, again, _ = command("speed", *use)
    assert (code, again, calls) == (0, table, [])
    assert (tmp_path / "samples.jsonl").read_text() == whole


def test_speed_tells_a_needles_folder_apart(command: Command, tmp_path: Path) -> None:
    use = ("--lengths", "300", "--new-tokens", "32", "--repeats", "1", "--model", "chat", "--out")
    code, _, err = command("speed", *use, str(tmp_path), "--needle")
    assert code == 0, err
    code, _, err = command("speed", *use, str(tmp_path))
    assert code == 2 and "needle true there, null here" in err


@pytest.mark.parametrize(
    ("suite", "spelling"), [("ppl", "chat/"), ("speed", "./chat"), ("needle", "{}/chat")]
)
def test_a_folder_knows_its_model_by_content(
    command: Command, folder: Path, tmp_path: Path, suite: str, spelling: str
) -> None:
    sizes = {
        "ppl": ("--lengths", "64", "--new-tokens", "8", "--samples", "1"),
        "speed": ("--lengths", "64", "--new-tokens", "2", "--repeats", "1"),
        "needle": ("--lengths", "256", "--depths", "0.5", "--samples", "1"),
    }[suite]
    use = (*sizes, "--methods", "dense", "--out", str(tmp_path))
    assert command(suite, *use, "--model", "chat", "--rope", "yarn:2")[0] == 0
    lines = (tmp_path / "samples.jsonl").read_text()
    code, _, err = command(suite, *use, "--model", spelling.format(folder), "--rope", "yarn:2.0")
    assert code == 0, err
    assert (tmp_path / "samples.jsonl").read_text() == lines
    (folder / "chat").rename(folder / "before")
    (folder / "next").rename(folder / "chat")  # the next checkpoint at the same path
    try:
        code, _, err = command(suite, *use, "--model", "chat", "--rope", "yarn:2")
    finally:
        (folder / "chat").rename(folder / "next")
        (folder / "before").rename(folder / "chat")
    assert code == 2 and err.startswith("farspan: ") and "the model's weights" in err and err.count("\n") == 1
    code, _, err = command(suite, *use, "--model", "chat")
    assert code == 2 and "the model's config" in err and "the model's weights" not in err
