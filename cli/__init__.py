"""The `farspan` command. Nothing here imports torch before a command needs it, so `--help` is quick.

Exit codes: 0 done, 1 a fault of farspan itself (with a traceback), 2 bad input (one sentence on stderr),
130 Ctrl-C.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments` (default: the process's own) and exit with its code."""
    from ..attention.errors import FarspanError
    from . import output
    from .app import app

    output.prepare()
    try:
        app(arguments, prog_name="farspan")
    except FarspanError as error:
        output.fail(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
