"""Triton's interpreter without its repeated work: the same arithmetic in about half the time.

It patches ``triton.language`` at every call of a device function. Once per launch and module is enough. It
also checks every 32-bit sum and product for overflow, in 64 bits. tests/ops keep that check; law 5 runs
without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime import interpreter


def patch_the_language_once_per_launch() -> None:
    """Replace ``InterpretedFunction.__call__``. In a release of Triton without it, tests only take longer."""
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter.InterpretedFunction, "rewrite"):
        return
    launch = interpreter.GridExecutor.__call__
    patched: set[str] = set()  # modules whose functions have been called in the present launch

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called


@contextmanager
def overflow_unchecked() -> Iterator[None]:
    """No check of 32-bit sums and products inside."""
    options = interpreter.interpreter_builder.options
    object.__setattr__(options, "sanitize_overflow", False)  # a frozen dataclass
    yield
    object.__setattr__(options, "sanitize_overflow", True)
