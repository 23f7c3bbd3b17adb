"""Error sentences for the command line: a Python argument in them becomes the command's option.

An error of farspan names a Python argument as ``name=`` or ``name=value``, after a space. Here "pass
recipe=PATH" becomes "pass --recipe PATH". A parameter of a method ("quest:k=64") does not follow a space and
stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

import typer

from ..attention.errors import FarspanError


def as_options(sentence: str, options: dict[str, str]) -> str:
    """The sentence with ``name=value`` as "--name value". options: the option of each Python name."""
    names = "|".join(map(re.escape, options))
    argument = re.compile(rf"""(?<!\S)({names})=('[^']*'|"[^"]*"|\S*?)(?=[.,;:)]*(?:\s|$))""")

    def spelt(match: re.Match[str]) -> str:
        value = match[2].strip("'\"")
        return f"{options[match[1]]} {match[2] if ' ' in value else value}".rstrip()

    return argument.sub(spelt, sentence)


def spellings(app: typer.Typer) -> dict[str, str]:
    """The long spelling of every option of every command of ``app``, by the option's Python name."""
    found: dict[str, str] = {}
    commands: list[Any] = [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        commands.extend(getattr(command, "commands", {}).values())
        for parameter in command.params:
            long = [x for x in parameter.opts if x.startswith("--")]
            if long:  # an argument has none
                found.setdefault(parameter.name, long[0])
    return found


def of_usage(error: Any) -> str:
    """One sentence about a command line that typer cannot read; "" if typer has shown its help instead."""
    said = error.format_message().strip().rstrip(".")
    if not said:
        return ""
    context = getattr(error, "ctx", None)
    where = "" if context is None else f"; see {context.command_path} --help"
    return f"{' '.join(said.split())}{where}."


def check_arguments(arguments: list[str]) -> None:
    """Raises FarspanError for arguments that no option takes: empty ones, and bytes that are not UTF-8."""
    for before, argument in zip(["farspan", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if argument == "" or (equals and not value and option.startswith("--")):
            raise FarspanError(
                f"An empty value follows {option if equals else before}: give a value, or leave both out."
            )
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            bytes_given = argument.encode("utf-8", "surrogateescape")
            raise FarspanError(
                f"The argument {str(bytes_given)[1:]} is not UTF-8 text: give it in UTF-8, or in a file."
            ) from None
