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
        help='Where the KV cache is kept: "device", "host" (pinned memory beside a GPU), "disk:folder=PATH".',
        callback=_checked,
    ),
]
