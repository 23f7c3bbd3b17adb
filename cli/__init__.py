"""The `farspan` command. Nothing here imports torch before a command needs it, so `--help` is quick.

Exit codes: 0 for success; 1 for a bug in farspan (with a traceback), a fault that `doctor` found (one
sentence) or no method that `recommend` could name; 2 for bad input or a failed rank (one sentence on stderr,
printed by one rank); 130 for Ctrl-C.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments` (default: those of the process) and exit with its exit code."""
    from typer.exceptions import TyperException

    from ..attention.errors import FarspanError
    from . import launch, output, sentences
    from .app import app

    output.prepare()
    given = sys.argv[1:] if arguments is None else arguments
    try:
        sentences.check_arguments(given)
        sys.exit(app(given, prog_name="farspan", standalone_mode=False))
    except FarspanError as error:
        launch.say_once(sentences.as_options(str(error), sentences.spellings(app)), output.fail)
        sys.exit(2)
    except TyperException as error:
        # One rank prints what is wrong with the usage; the others exit with the same code.
        if not launch.leads():
            launch.wait_for_rank_0()
        elif said := sentences.of_usage(error):
            output.fail(said)
        sys.exit(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as ended:
        if not ended.code:
            launch.leave()
        raise
