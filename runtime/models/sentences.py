"""Turn errors of other libraries into sentences, and hide their progress bars."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from .aliases import ALIASES


@contextlib.contextmanager
def disk_errors_as_sentences(folder: Path) -> Iterator[None]:
    """A context in which a model is written below `folder`: turns an OSError into a FarspanError."""
    try:
        yield
    except OSError as error:
        what = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "your quota is used up",
            errno.EROFS: "the disk is read-only",
            errno.EACCES: "you may not write there",
            errno.EPERM: "you may not write there",
        }.get(error.errno or 0)
        detail = f"{what} ({error.strerror})" if what else f"{error.strerror or error}"
        raise FarspanError(
            f"Could not keep the model in {folder}: {detail}. Free some space, or set FARSPAN_CACHE to "
            "another folder."
        ) from error


@contextlib.contextmanager
def errors_as_sentences(name: str, target: Path | str) -> Iterator[None]:
    """A context in which transformers loads a model: turns its errors into a FarspanError. target: the folder
    or hub id that is loaded; name: the one that the user gave."""
    try:
        yield
    except FarspanError:
        raise
    except Exception as error:
        first = sentence_of(error)
        if isinstance(target, Path):
            raise FarspanError(f"Could not load a causal language model from {target}: {first}.") from error
        chain = {type(link).__name__ for link in _causes(error)}
        if "GatedRepoError" in chain:
            why = "the hub asks you to accept its licence there and to log in first ('hf auth login')"
        elif "RepositoryNotFoundError" in chain or "HFValidationError" in chain:
            why = "the Hugging Face hub has no such model (or it is private)"
        elif "LocalEntryNotFoundError" in chain or "couldn't connect" in first:
            why = "the Hugging Face hub cannot be reached, and the model is not in its local cache"
        else:
            why = first
        raise FarspanError(
            f"Could not load {name!r}: {why}. Give a hub id, a local folder, or an alias "
            f"({', '.join(ALIASES)})."
        ) from error


def sentence_of(error: BaseException) -> str:
    """The beginning of an error's message, on one line and without its full stop: the lines up to the first
    one that ends a sentence."""
    words: list[str] = []
    for line in str(error).split("\n"):
        words += line.split()
        if words and words[-1].endswith((".", "!", "?")):
            break
    return " ".join(words).rstrip(".") or type(error).__name__


def check_weights(name: str, found: Mapping[str, Any]) -> None:
    """Check that the weights fit their config. found: the loading info of transformers.

    Raises:
        FarspanError: a tensor of the config is missing, or has another shape.
    """
    unfit = [
        f"{key} is {list(actual)} in the weights and {list(expected)} by the config"
        for key, actual, expected in sorted(found["mismatched_keys"])
    ]
    unfit += [f"there is no {key} in the weights" for key in sorted(found["missing_keys"])]
    if unfit:
        more = f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
        raise FarspanError(
            f"The config of {name} does not fit its weights: {unfit[0]}{more}. Take config.json and weights "
            "from the same model."
        )


@contextlib.contextmanager
def unfit_weights_unreported() -> Iterator[None]:
    """A context that hides transformers' table of missing and misshapen weights, which `check_weights` names.
    The table of unused weights is shown."""

    def keep(record: logging.LogRecord) -> bool:
        return not re.search("LOAD REPORT.*(MISSING|MISMATCH)", record.getMessage(), re.DOTALL)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def quiet(always: bool = False) -> Iterator[None]:
    """A context that hides the hub client's retry lines, and transformers' progress bars where stderr is not
    a terminal. always: hide the progress bars on a terminal too."""
    from transformers.utils import logging as transformers_logging

    hide = always or not sys.stderr.isatty()
    bars = transformers_logging.is_progress_bar_enabled()
    retries = logging.getLogger("huggingface_hub")
    level = retries.level
    if hide:
        transformers_logging.disable_progress_bar()
    retries.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retries.setLevel(level)
        if hide and bars:
            transformers_logging.enable_progress_bar()
