"""How a prompt is made shorter, by name: the options of `farspan.compress`, and "compress:keep=0.3 + quest".

Nothing heavy is imported here, so that a command ends at once where a spec is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_type_hints

from ...attention.errors import FarspanError
from ...attention.spec import parse_parameters, split_spec

NAME, DENSE = "compress", "dense"
ATTENTION = "attention"
KEEP, PASSAGE, MARK, PIECE = 0.3, 64, "[...]", 1024


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What a row says of its prompts: the options of `farspan.compress` of these names. scorer: "attention",
    or the folder of a recipe. Raises FarspanError for a wrong `keep`."""

    keep: float = KEEP
    scorer: str = ATTENTION
    passage: int = PASSAGE

    def __post_init__(self) -> None:
        check_keep(self.keep)


def check_keep(keep: float) -> None:
    """Raises FarspanError for a fraction that is not in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise FarspanError(f"keep is a fraction of the prompt's tokens, above 0 and at most 1; got {keep!r}.")


def split(spec: str) -> tuple[Compression | None, str]:
    """How a row shortens its prompts, and its method. Raises SpecError for a wrong option."""
    first, _, method = spec.partition(" + ")
    name, text = split_spec(first)
    if name != NAME:
        return None, spec
    defaults = {field.name: field.default for field in fields(Compression)}
    values = parse_parameters(NAME, text, defaults, get_type_hints(Compression))
    return Compression(**values), method.strip() or DENSE


def method_of(spec: str, *, shortens: bool) -> str:
    """The method of a row. shortens: whether a row may shorten prompts; raises FarspanError where it does and
    may not."""
    compression, method = split(spec)
    if compression is not None and not shortens:
        raise FarspanError(
            f"{spec!r} shortens prompts, which only rows of the evaluations ruler, needle, retrieval and "
            f"turns can: leave {NAME} out. farspan generate has the option --compress for it."
        )
    return method
