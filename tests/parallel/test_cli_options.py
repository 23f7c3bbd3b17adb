"""Ranks that are given other options: every option of every command that is spread over ranks is compared."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer

from farspan.cli import launch as job
from farspan.cli.app import app

from . import launch

OTHER = {"boolean": [], "integer": ["7"], "integer range": ["7"], "float": ["0.5"], "float range": ["0.5"]}


def spread_commands(group: Any = None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The commands that a launcher's ranks run together: those that have --parallel."""
    found = {}
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            found |= spread_commands(command, (*path, name))
        elif any("--parallel" in param.opts for param in command.params):
            found[(*path, name)] = command
    return found


def cases() -> dict[str, tuple[list[str], list[str]]]:
    """By command and option, what rank 0 and rank 1 are given."""
    found = {}
    for path, command in spread_commands().items():
        for param in command.params:
            option = max(param.opts, key=len)
            if option != "--help":
                given = [*path, *(["--model", "nowhere"] if option != "--model" else [])]
                found[f"{' '.join(path)} {option}"] = (
                    given,
                    [*given, option, *OTHER.get(param.type.name, ["other"])],
                )
    return found


CASES = cases()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: Any) -> dict[str, list[tuple[int, str, str]]]:
    file = tmp_path_factory.mktemp("options") / "commands.json"
    commands = [[name, *given] for name, given in CASES.items()]
    commands += [["another command", ["generate"], ["eval", "needle", "--seed", "3"]]]
    commands += [["long", ["generate", "-p", "a" * 500], ["generate", "-p", "a" * 499 + "b"]]]
    same = ["generate", "--model", "nowhere", "--prompt", "x", "--device", "cpu"]
    commands += [["the same", same, same]]
    file.write_text(json.dumps(commands))
    assert [rank.code for rank in launch.ranks(2, "script_options.py", str(file), within=300)] == [0, 0]
    ranks = [json.loads(file.with_name(f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [tuple(rank[name]) for rank in ranks] for name, *_ in commands}


def said(results: list[tuple[int, str, str]]) -> str:
    """The one sentence of two ranks that both end in exit code 2 and print nothing."""
    assert [(code, out) for code, out, _ in results] == [(2, ""), (2, "")]
    [line] = [line for _, _, err in results for line in err.splitlines() if line.strip()]
    return line


def test_the_commands_that_are_spread():
    found = spread_commands()
    assert {" ".join(path) for path in found} == {
        "generate",
        "eval ruler",
        "eval needle",
        "eval ppl",
        "eval speed",
    }
    assert all(isinstance(command, job.SpreadCommand) for command in found.values())


@pytest.mark.parametrize("name", CASES)
def test_another_option_on_a_rank_is_one_sentence(ended: Any, name: str):
    command, _, option = name.rpartition(" ")
    line, ranks = said(ended[name]), "The ranks were given different options of farspan"
    assert line.startswith(f"farspan: {ranks} {command}: {option} is ")
    assert " on rank 1 and " in line and line.endswith("Start every rank with the same command.")
    assert line.count(" on rank 1 ") == 1, "no other option differs"


def test_another_command_on_a_rank(ended: Any):
    line = said(ended["another command"])
    assert "the command is farspan eval needle on rank 1 and farspan generate on the others" in line


def test_a_long_value_is_compared_whole(ended: Any):
    line = said(ended["long"])
    assert "--prompt is 'aaa" in line and len(line) < 400


def test_the_same_options_pass(ended: Any):
    assert "nowhere" in said(ended["the same"])


def test_ranks_may_name_devices_of_their_own():
    kinds = [job._as_text("device", name) for name in ("cuda:0", "cuda:1", "cpu")]
    assert kinds[0] == kinds[1] != kinds[2]
    assert job._as_text("model", "a:0") != job._as_text("model", "a:1")
