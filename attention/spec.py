"""How users name methods: ``"recycled:k=512,stride=10"``."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from . import calibrated, chunked, dense, recycled, sparse  # noqa: F401  (importing a method registers it)
from .checks import type_hints
from .errors import SpecError
from .method import AttentionMethod, registered

T = TypeVar("T")

_RENAMED = {"share": "gqa_reduce"}  # parameters of earlier versions, by their names now
_SIZES = {"k", "fraction"}  # budgets that say how much is read
_OUTSIDE = re.compile(r",(?![^()]*\))")  # commas that stand outside of parentheses


def methods() -> dict[str, type[AttentionMethod]]:
    """Every method there is, by name; methods defined outside farspan are among them."""
    return registered()


def parse_method(spec: str | AttentionMethod) -> AttentionMethod:
    """A method from ``"name"`` or ``"name:par=value,par=value"``; a method object is returned as it is. A
    value that is itself a method with parameters stands in parentheses: ``"act:over=(sale:threshold=1)"``.

    Raises SpecError, naming the nearest known name, for an unknown method or parameter and for a value it
    cannot take.
    """
    if isinstance(spec, AttentionMethod):
        return spec
    if not isinstance(spec, str):
        raise SpecError(
            f"A method is a string such as 'recycled:k=512,stride=10' or a method object; got {spec!r}."
        )
    name, rest = split_spec(spec)
    cls = find("method", name, methods())
    hints = type_hints(cls)
    fields = {f.name: f for f in parameters_of(cls)}
    values = parse_parameters(name, rest, {key: f.default for key, f in fields.items()}, hints)
    if values.keys() & _SIZES:  # a budget takes the place of the default one
        for other in (_SIZES | {"mass"}) & fields.keys():
            if type(None) in typing.get_args(hints[other]):
                values.setdefault(other, None)
    return cls(**values)


def parameters_of(cls: type[AttentionMethod]) -> list[dataclasses.Field[Any]]:
    """The fields of a method that a spec can name."""
    return [f for f in dataclasses.fields(cls) if f.init and f.metadata.get("spec", True)]


def find(kind: str, name: str, known: Mapping[str, T]) -> T:
    """``known[name]``. kind: what they are, such as "method", for the error.

    Raises SpecError, naming the nearest known name, for an unknown one.
    """
    if name not in known:
        raise SpecError(
            f"There is no {kind} {name!r}{_nearest(name, known)}; the {kind}s are {', '.join(known)}."
        )
    return known[name]


def split_spec(spec: str) -> tuple[str, str]:
    """``"name:par=value"`` -> the name and the text of the parameters."""
    name, _, rest = spec.strip().partition(":")
    return name.strip(), rest


def parse_parameters(
    name: str, text: str, defaults: Mapping[str, Any], hints: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of ``"par=value,par=value"``, each converted to the type that ``hints`` gives.

    name: of what takes the parameters, for errors. defaults: the parameters that it takes and their defaults.
    Raises SpecError for an unknown parameter, one that comes twice, and a value of another type.
    """
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in _OUTSIDE.split(text))):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if key in _RENAMED and _RENAMED[key] in defaults:
            raise SpecError(f"{name} has no parameter {key!r}: it is called {_RENAMED[key]!r} now.")
        if key not in defaults:
            takes = f"it takes {', '.join(defaults)}" if defaults else "it takes none"
            raise SpecError(f"{name} has no parameter {key!r}{_nearest(key, defaults)}; {takes}.")
        if not equals or not value:
            raise SpecError(
                f"{name} needs a value for {key}, as in '{name}:{key}={defaults[key]}'; got {item!r}."
            )
        if key in values:
            raise SpecError(f"{name} got the parameter {key} twice in {text!r}.")
        values[key] = _convert(name, key, value, hints[key])
    return values


def _convert(name: str, key: str, text: str, hint: Any) -> Any:
    """The value of parameter ``key`` of method ``name``, of the type ``hint``, from its text."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if text.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    for kind in kinds:
        if kind is bool:
            if text.lower() in ("true", "false", "1", "0", "yes", "no"):
                return text.lower() in ("true", "1", "yes")
        elif kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        elif kind is str:
            return text
        elif issubclass(kind, AttentionMethod):
            if text[0] == "(" and text[-1] != ")":
                raise SpecError(
                    f"The parenthesis of {key}={text} in {name} is not closed; write "
                    f"{key}=(METHOD:PAR=VALUE)."
                )
            return parse_method(text[1:-1] if text[0] == "(" and text[-1] == ")" else text)
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}
    raise SpecError(f"{name} takes {wanted.get(kinds[0], kinds[0])} for {key}; got {text!r}.")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
