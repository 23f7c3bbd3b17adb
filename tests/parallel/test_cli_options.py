"""Ranks that are given other options: every option of every command that is spread over ranks is compared."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer

from farspan.cli import launch as job
from farspan.cli.app import app

from . import launch


def spread_commands(group: Any = None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The commands that a launcher's ranks run together: those that have --parallel."""
    found = {}
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            found |= spread_commands(command, (*path, name))
        elif any("--parallel" in param.opts for param in command.params):
            found[(*path, name)] = command
    return found


OTHER = {
    "--dtype": "float32",
    "--rope": "yarn:4",
    "--storage": "int8",
}  # others are refused as they are read


def others(command: Any) -> dict[str, list[str]]:
    """By option of a command, another value than its default, as it is written."""
    found = {}
    for param in command.params:
        option = max(param.opts, key=len)
        if param.name in job.SECRET:
            continue
        if option != "--help" and not param.hidden:  # hidden ones only say what they are called now
            value = OTHER.get(option, "0.5" if isinstance(param.default, float) else "7")
            found[option] = [option] if param.is_flag else [option, value]
    return found


SPREAD = {" ".join(path): others(command) for path, command in spread_commands().items()}
NEEDED = {  # the options that a command cannot do without, with yet another value
    " ".join(path): [
        word for param in command.params if param.required for word in (max(param.opts, key=len), "8")
    ]
    for path, command in spread_commands().items()
}
SUITES = ("fidelity", "lm-eval", "needle", "ppl", "retrieval", "ruler", "speed", "turns")
GENERATE = ["generate", "--model", "nowhere", "--prompt", "x", "--device", "cpu"]
ONE = {  # what rank 1 is given besides
    "--dtype": "--dtype is 'float32' on rank 1 and 'auto' on the others",
    "--max-new-tokens": "--max-new-tokens is 9 on rank 1 and 256 on the others",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: Any) -> dict[str, list[tuple[int, str, str]]]:
    file = tmp_path_factory.mktemp("options") / "commands.json"
    commands = [
        [
            name,
            [*name.split(), *NEEDED[name]],
            [*name.split(), *(word for words in options.values() for word in words)],
        ]
        for name, options in SPREAD.items()
    ]
    commands += [
        [option, GENERATE, [*GENERATE, *text.split(" on ")[0].replace("'", "").split(" is ")]]
        for option, text in ONE.items()
    ]
    commands += [["another command", ["generate"], ["eval", "needle", "--seed", "3"]]]
    commands += [["long", ["generate", "-p", "a" * 500], ["generate", "-p", "a" * 499 + "b"]]]
    same = [*GENERATE, "--method", "recicled"]  # ends before a model is looked for
    commands += [["the same", same, same]]
    file.write_text(json.dumps(commands))
    assert [rank.code for rank in launch.ranks(2, "script_options.py", str(file), within=120)] == [0, 0]
    ranks = [json.loads(file.with_name(f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [tuple(rank[name]) for rank in ranks] for name, *_ in commands}


def said(results: list[tuple[int, str, str]]) -> str:
    """The one sentence of two ranks that both end in exit code 2 and print nothing."""
    assert [(code, out) for code, out, _ in results] == [(2, ""), (2, "")]
    [line] = [line for _, _, err in results for line in err.splitlines() if line.strip()]
    return line


def test_the_commands_that_are_spread():
    assert set(SPREAD) == {"generate", "serve", *(f"eval {suite}" for suite in SUITES)}
    assert all(isinstance(command, job.SpreadCommand) for command in spread_commands().values())


@pytest.mark.parametrize("name", SPREAD)
def test_every_option_is_compared(ended: Any, name: str):
    line, ranks = said(ended[name]), f"The ranks were given different options of farspan {name}: "
    assert line.startswith(f"farspan: {ranks}")
    assert line.endswith(" on the others. Start every rank with the same command.")
    named = [part.partition(" is ")[0] for part in line.partition(ranks)[2].split("; ")]
    assert sorted(named) == sorted(SPREAD[name])


@pytest.mark.parametrize("option", ONE)
def test_what_differs_is_said(ended: Any, option: str):
    assert f"of farspan generate: {ONE[option]}. Start" in said(ended[option])


def test_another_command_on_a_rank(ended: Any):
    line = said(ended["another command"])
    assert "the command is farspan eval needle on rank 1 and farspan generate on the others" in line


def test_a_long_value_is_compared_whole(ended: Any):
    line = said(ended["long"])
    assert "--prompt is 'aaa" in line and len(line) < 400


def test_no_sentence_can_quote_a_key(ended: Any):
    assert {"api_key"} == job.SECRET and "--api-key" not in said(ended["serve"])


def test_the_same_options_pass(ended: Any):
    assert "did you mean 'recycled'" in said(ended["the same"])


def test_ranks_may_name_devices_of_their_own():
    kinds = [job._as_text("device", name) for name in ("cuda:0", "cuda:1", "cpu")]
    assert kinds[0] == kinds[1] != kinds[2]
    assert job._as_text("model", "a:0") != job._as_text("model", "a:1")
