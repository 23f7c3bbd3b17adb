"""The option --storage."""

from __future__ import annotations

from typing import Annotated

import typer


def _checked(value: str | None) -> str | None:
    """The value of --storage. A wrong one is refused here, before a model is read."""
    if value is not None:
        from ..runtime.store.storage import parse_storage

        parse_storage(value)
    return value


Storage = Annotated[
    str | None,
    typer.Option(
        help='How the KV cache is kept: in "int8" or "int4" (8 or 4 bits for a number), in "host" (pinned '
        'memory beside a GPU), in "disk:folder=PATH" (files), or both, as in "int8+disk" '
        "[default: plain numbers on the device].",
        show_default=False,
        callback=_checked,
    ),
]
