"""What an error says, in the words of the command line.

farspan's errors name a Python argument as ``name=`` or ``name=value``, after a space; the command names its
option instead: "pass recipe=PATH" is "pass --recipe PATH". Parameters of a method ("quest:k=64") follow no
space.
"""

from __future__ import annotations

import re
from typing import Any

import typer

from ..attention.errors import FarspanError


def as_options(sentence: str, options: dict[str, str]) -> str:
    """The sentence with ``name=value`` as "--name value". options: each spelling, by its Python name."""
    names = "|".join(map(re.escape, options))
    argument = re.compile(rf"""(?<!\S)({names})=('[^']*'|"[^"]*"|\S*?)(?=[.,;:)]*(?:\s|$))""")

    def spelt(match: re.Match[str]) -> str:
        value = match[2].strip("'\"")
        return f"{options[match[1]]} {match[2] if ' ' in value else value}".rstrip()

    return argument.sub(spelt, sentence)


def spellings(app: typer.Typer) -> dict[str, str]:
    """By Python name, the long spelling of every option of every command of ``app``."""
    found: dict[str, str] = {}
    commands: list[Any] = [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        commands.extend(getattr(command, "commands", {}).values())
        for parameter in command.params:
            found.setdefault(parameter.name, next(x for x in parameter.opts if x.startswith("--")))
    return found


def of_usage(error: Any) -> str:
    """One sentence of a command line that typer cannot read; "" where it has shown its help instead."""
    said = error.format_message().strip().rstrip(".")
    if not said:
        return ""
    context = getattr(error, "ctx", None)
    where = "" if context is None else f"; see {context.command_path} --help"
    return f"{' '.join(said.split())}{where}."


def check_arguments(arguments: list[str]) -> None:
    """Raises FarspanError for what no option can take: bytes that are not UTF-8, and nothing at all."""
    for before, argument in zip(["farspan", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if argument == "" or (equals and not value and option.startswith("--")):
            raise FarspanError(
                f"An empty value follows {option if equals else before}: give one, or leave both out."
            )
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            bytes_given = argument.encode("utf-8", "surrogateescape")
            raise FarspanError(
                f"The argument {str(bytes_given)[1:]} is not UTF-8 text: give it in UTF-8, or in a file."
            ) from None
