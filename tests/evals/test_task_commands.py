"""The commands of the tasks on a tiny model: each writes a folder and prints a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .qa_data import write

Command = Callable[..., tuple[int, str, str]]
METHODS = ("--methods", "dense; window:w=64,sinks=4", "--samples", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, smollm2_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tiny_llama(vocab_size=49152).save_pretrained(folder / "model")
    smollm2_tokenizer.save_pretrained(folder / "model")
    write(folder)
    (folder / "prompt.txt").write_text("Which river rose in the night?")
    (folder / "one.jsonl").write_text('"Which river?"\n"a"\n')
    return folder


@pytest.fixture
def command(
    folder: Path, farspan_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    monkeypatch.chdir(folder)

    def run(suite: str, *arguments: str) -> tuple[int, str, str]:
        given = ("eval", suite, "--model", "model", "--out", str(tmp_path / "out"), *arguments)
        return farspan_command(*given, columns=120)

    return run


@pytest.mark.parametrize(
    ("suite", "arguments", "tasks"),
    [
        ("ruler", ("--tasks", "qa_1,qa_2", "--qa-data", "squad.json,hotpot.json", "--lengths", "2K",
                   *METHODS), ["qa_1", "qa_2"]),
        ("ruler", ("--tasks", "niah_single_1", "--compat", "--lengths", "1K", *METHODS), ["niah_single_1"]),
        ("needle", ("--tasks", "multi_value,uuid_chain", "--depths", "0.5", "--lengths", "600", *METHODS),
         ["multi_value", "uuid_chain"]),
        ("retrieval", ("--lengths", "600", *METHODS), ["kv", "passkey"]),
        ("turns", ("--lengths", "900", "--turns", "2", *METHODS), ["kv_1", "kv_2", "needle_1", "needle_2"]),
        ("fidelity", ("--prompts", "prompt.txt", "--new-tokens", "8", *METHODS[:2]), ["prompts"]),
    ],
)  # fmt: skip
def test_a_command_writes_its_folder(
    command: Command, tmp_path: Path, suite: str, arguments: tuple[str, ...], tasks: list[str]
) -> None:
    code, out, err = command(suite, *arguments)
    assert code == 0 and f"{suite} · model" in out, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert sorted({row["task"] for row in rows}) == tasks and len(rows) == 2 * len(tasks)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["suite"] == suite and config.get("compat", False) is ("--compat" in arguments)
    assert (tmp_path / "out" / f"{suite}.md").exists()
    code, again, err = command(suite, *arguments, "--json")
    assert code == 0 and json.loads(again)["rows"] == len(rows) and json.loads(again)["complete"], err


def test_wrong_options_end_in_a_sentence(command: Command, tmp_path: Path) -> None:
    for suite, arguments, sentence in (
        ("retrieval", ("--tasks", "pass"), "there is no retrieval task 'pass'"),
        ("turns", ("--lengths", "100"), "needs a length of at least"),
        ("ruler", ("--tasks", "qa_1", "--qa-data", "prompt.txt"), "prompt.txt cannot be read"),
        ("ruler", ("--tasks", "qa_1", "--qa-data", "squad.json", "--lengths", "1M"), "positions"),
        ("fidelity", ("--prompts", "nowhere.txt"), "nowhere.txt cannot be read"),
        ("fidelity", ("--prompts", "one.jsonl", "--no-chat"), "Prompt 2 of 2 has fewer than 2 tokens"),
        ("lm-eval", ("--tasks", "x", "--truncate", "left"), ""),
    ):
        code, _, err = command(suite, *arguments)
        assert code == 2 and sentence in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
