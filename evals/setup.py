"""What the evaluations have in common: the model, the methods, the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.models import choose_chat


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, and where it is written: the first argument of `run`, `perplexity` and `speed`.

    model, tokenizer: a loaded causal LM and its tokenizer.
    methods: specs as `farspan.patch` takes them; dense among them is what the others are compared with.
    out: the output folder, which is resumed if it is there.
    name: what reports call the model.
    config: settings that give the numbers their meaning, such as the text. They are written to config.json,
        and a folder with other settings is refused.
    recipe: a saved calibration for the methods that need one.
    storage: how caches keep keys and values, as `farspan.patch` takes it, for every method.
    parallel: the ranks to spread each prompt over, as `farspan.patch` takes it; dense is spread, too.
    progress: whether a progress bar is shown on stderr.
    """

    model: Any
    tokenizer: Any
    methods: Sequence[str]
    out: str | Path
    name: str
    config: Mapping[str, Any]
    recipe: str | Path | None = None
    storage: str | None = None
    parallel: Any = None
    progress: bool = True


def with_chat(tokenizer: Any, chat: bool | None) -> tuple[Any, dict[str, Any]]:
    """The tokenizer with or without its chat format (see `choose_chat`), and what config.json says of that.

    It mentions the format only where it is not used. So chat=True, which is the default, makes no other
    folder.
    """
    chosen = choose_chat(tokenizer, chat)
    return chosen, {} if chosen is tokenizer else {"chat": False}
