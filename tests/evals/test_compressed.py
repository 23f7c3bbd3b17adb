"""Rows with shorter prompts: how they are named, what is written, and the commands that shorten prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import farspan
from farspan import FarspanError, SpecError
from farspan.runtime.compress.spec import Compression, method_of, split

KEPT = "compress:keep=0.5 + window:w=64"


def test_a_row_names_its_compression_and_its_method() -> None:
    assert split("quest:k=64") == (None, "quest:k=64")
    assert split("block_topk + quest") == (None, "block_topk + quest")
    assert split("compress") == (Compression(), "dense")
    assert split(KEPT) == (Compression(keep=0.5), "window:w=64")
    assert (
        method_of("compress:passage=32,scorer=a/b + block_topk + quest", shortens=True)
        == "block_topk + quest"
    )
    with pytest.raises(SpecError, match="compress has no parameter 'kept'"):
        split("compress:kept=0.5")
    with pytest.raises(FarspanError, match="above 0 and at most 1"):
        split("compress:keep=2")


@pytest.mark.parametrize("suite", ["needle", "turns"])
def test_a_row_says_what_the_shorter_prompt_cost(
    suite: str, small_needle: list[str], farspan_command: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["0.5" if word == "0,1" else word for word in small_needle]
    words[words.index("dense; window:w=64")] = f"dense; window:w=64; {KEPT}"
    words[words.index("--samples") + 1] = "1"
    if suite == "turns":
        words = [x for x in words if x not in ("--depths", "0.5")]
        words[1] = "turns"
        words += ["--tasks", "needle", "--turns", "2"]
    out = tmp_path / "out"
    code, _, error = farspan_command(*words, "--out", str(out))
    assert code == 0, error
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    by_method = {name: [row for row in rows if row["method"] == name] for name in ("window:w=64", KEPT)}
    for whole, short in zip(*by_method.values(), strict=True):
        made = short["compressed"]
        assert made["tokens_after"] <= 0.5 * made["tokens_before"] and 0 < made["kept"] < made["passages"]
        assert short["key"] == whole["key"] and short["recipe"] == whole["recipe"]
        assert short["prompt_tokens"] < whole["prompt_tokens"]
        assert short["density"]["decode"] <= whole["density"]["decode"] + 0.05
        assert "compressed" not in whole
    first, *later = by_method[KEPT]
    assert first["seconds"]["prefill"] > first["compressed"]["seconds"]
    assert len(later) == (suite == "turns")
    before = (out / "samples.jsonl").read_text()
    assert farspan_command(*words, "--out", str(out))[0] == 0
    assert (out / "samples.jsonl").read_text() == before  # a second run finds every row there


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["eval", "ppl", "--methods", KEPT],
            "only rows of the evaluations ruler, needle, retrieval and turns can",
        ),
        (["generate", "--prompt", "A?", "--method", KEPT], "farspan generate has the option --compress"),
        (["eval", "needle", "--methods", "compress:keep=0"], "above 0 and at most 1; got 0"),
        (["eval", "needle", "--methods", "compress + qest"], "did you mean 'quest'"),
        (
            ["eval", "needle", "--lengths", "256", "--methods", "compress:scorer=nix"],
            "There is no recipe at nix",
        ),
        (["generate", "--prompt", "A. B. C?", "--compress", "0"], "above 0 and at most 1; got 0"),
        (["generate", "--prompt", "A. B. C?", "--query", "C"], "--query belongs to --compress"),
        (["generate", "--prompt", "A. B. C?", "--compress", "0.3"], "give a larger keep"),
    ],
)
def test_bad_commands(
    words: list[str], sentence: str, tiny_folder: Path, farspan_command: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "prose.txt").write_text("It rained in the morning and the river rose. " * 400)
    more = (
        ["--text", str(tmp_path / "prose.txt"), "--out", str(tmp_path / "out")] if words[0] == "eval" else []
    )
    code, _, error = farspan_command(*words, "--model", str(tiny_folder), *more)
    assert code == 2 and sentence in " ".join(error.split()) and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_generate_answers_the_shorter_prompt(tiny_folder: Path, farspan_command: Callable[..., Any]) -> None:
    notes = "".join(f"Note {i}: the box of guest {i} is in room {i * 7}.\n\n" for i in range(12))
    prompt = f"Read the notes.\n\n{notes}Where is the box of guest 5?"
    words = ["generate", "--model", str(tiny_folder), "--prompt", prompt, "--max-new-tokens", "2", "--json"]
    code, text, error = farspan_command(*words, "--compress", "0.5", "--no-chat")
    assert code == 0, error
    found = json.loads(text)
    made = found["compressed"]
    assert found["prompt_tokens"] == made["tokens_after"] <= 0.5 * made["tokens_before"]
    assert "".join(one["text"] for one in made["passages"]) == prompt
    model, tokenizer = farspan.load(str(tiny_folder))
    assert made["passages"] == farspan.compress(model, tokenizer, prompt, keep=0.5).to_dict()["passages"]


def test_train_saves_a_scorer_for_generate(
    tiny_folder: Path, farspan_command: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "prose.txt").write_text("It rained in the morning and the river rose. " * 80)
    words = ["--model", str(tiny_folder), "--text", str(tmp_path / "prose.txt"), "--out", str(tmp_path / "r")]
    sizes = ["--steps", "2", "--window", "128", "--held-out", "1"]
    code, text, error = farspan_command("train", "retriever:width=16", *words, *sizes)
    assert (
        code == 0
        and "top1_in" in text
        and f"--compress 0.3 --scorer {tmp_path / 'r'}" in " ".join(error.split())
    )
    prompt = "First.\n\n" + "Some more words are here.\n\n" * 8 + "Which?"
    words = ["generate", "--model", str(tiny_folder), "--prompt", prompt, "--max-new-tokens", "1", "--json"]
    code, text, error = farspan_command(*words, "--compress", "0.5", "--scorer", str(tmp_path / "r"))
    assert code == 0, error
    assert json.loads(text)["compressed"]["scorer"] == "retriever"
