"""The `farspan` command. Nothing here imports torch before a command needs it, so `--help` is quick.

Exit codes: 0 done, 1 a fault of farspan itself (with a traceback) or one that `doctor` has found (one
sentence), 2 bad input or a rank that failed (one sentence on stderr, of all ranks together), 130 Ctrl-C.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments` (default: the process's own) and exit with its code."""
    from typer.exceptions import TyperException

    from ..attention.errors import FarspanError
    from . import launch, output
    from .app import app

    output.prepare()
    try:
        # Of several ranks, one shows help and wrong usage; the others end as it does.
        sys.exit(app(arguments, prog_name="farspan", standalone_mode=launch.leads()))
    except FarspanError as error:
        launch.say_once(str(error), output.fail)
        sys.exit(2)
    except TyperException as error:
        launch.let_rank_0_speak()
        sys.exit(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as ended:
        if not ended.code:
            launch.leave()
        raise
