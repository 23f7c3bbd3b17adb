"""How results were made: commands, settings and machines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..folders import FIDELITY, FROM_SCRATCH, NEEDLE, PERPLEXITY, RULER, SPEED, Evaluation
from ..tables import short_length

_OPTIONS = {
    RULER: ("lengths", "tasks", "samples", "seed"),
    NEEDLE: ("lengths", "tasks", "depths", "samples", "seed"),
    PERPLEXITY: ("lengths", "new_tokens", "samples"),
    SPEED: ("lengths", "new_tokens", "repeats", "batch_size"),
    FIDELITY: ("new_tokens",),
    "retrieval": ("lengths", "tasks", "samples", "seed"),
    "turns": ("lengths", "samples", "seed", "turns"),
    **dict.fromkeys(FROM_SCRATCH, ("tasks", "dims", "rates", "seeds", "samples", "epochs", "first")),
}
_SPELT = {"dims": "dim", "rates": "lr"}
_MACHINE = ("gpu", "cpu", "cores", "threads", "ranks", "device", "python", "system")


@dataclass(frozen=True)
class Made:
    """How one evaluation was made. exact: whether the commands are those that ran, or rebuilt ones."""

    title: str
    folders: list[str]
    commands: list[str]
    exact: bool
    facts: list[tuple[str, str]]
    machines: list[str]


def made(one: Evaluation) -> Made:
    """Commands, settings and machines of an evaluation."""
    sessions = one.config.get("sessions", [])
    ran = list(dict.fromkeys(s["command"] for s in sessions if isinstance(s.get("command"), str)))
    found = one.config.get("versions")
    versions = found if isinstance(found, dict) else {}
    facts = [
        ("model", one.model),
        ("dtype", str(one.config.get("dtype") or "not recorded")),
        ("text", str(one.config.get("haystack") or one.config.get("text") or "none")),
        ("seed", str(one.config.get("seed", "not recorded"))),
        ("rope", str(one.config.get("rope") or "as the model has it")),
        ("rows", f"{len(one.rows):,}"),
        *((name, str(version)) for name, version in versions.items()),
    ]
    machines: dict[str, int] = {}
    for session in sessions:
        line = ", ".join(f"{name} {session[name]}" for name in _MACHINE if session.get(name) is not None)
        machines[line] = machines.get(line, 0) + 1
    return Made(
        title=f"{one.model}, {one.suite}",
        folders=[folder.name for folder in one.folders],
        commands=ran or [command(one.config)],
        exact=bool(ran),
        facts=facts,
        machines=[
            f"{line} ({count} {'session' if count == 1 else 'sessions'})" for line, count in machines.items()
        ],
    )


def command(config: Mapping[str, Any]) -> str:
    """The command of `farspan eval` that makes the results of such a config.json.

    A folder that grew in several sessions was made by several commands; this one asks for all of it.
    """
    suite = str(config.get("suite"))
    words = ["farspan", "eval", suite]
    if suite in FROM_SCRATCH:
        words += ["--mixers", ",".join(_quoted(mixer) for mixer in config["methods"])]
    else:
        words += ["--model", str(config.get("model")), "--dtype", str(config.get("dtype"))]
        words += ["--methods", "; ".join(config["methods"])]
    for name in _OPTIONS.get(suite, ()):
        value = config.get(name)
        if value is not None:
            option = "settings" if name == "tasks" and suite in FROM_SCRATCH else _SPELT.get(name, name)
            items = value if isinstance(value, list) else [value]
            sized = name == "lengths"
            words += [f"--{option.replace('_', '-')}", ",".join(_item(x, sized) for x in items)]
    if (text := config.get("haystack") or config.get("text")) not in (None, "sotu"):
        words += ["--text", str(text)]
    if config.get("rope"):
        words += ["--rope", str(config["rope"])]
    if config.get("storage"):
        words += ["--storage", str(config["storage"])]
    if config.get("chat") is False:
        words.append("--no-chat")
    if any("recipe=" not in spec for spec in config.get("recipes", {})):
        words += ["--recipe", "RECIPE"]
    return shlex.join(words)


def _item(value: Any, sized: bool) -> str:
    return short_length(value) if sized else f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(mixer: str) -> str:
    return f'"{mixer}"' if "," in mixer else mixer
