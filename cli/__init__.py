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
        # Of several ranks, one shows wrong usage; the others end as it does.
        if not launch.leads():
            launch.let_rank_0_speak()
        elif said := sentences.of_usage(error):
            output.fail(said)
        sys.exit(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as ended:
        if not ended.code:
            launch.leave()
        raise
