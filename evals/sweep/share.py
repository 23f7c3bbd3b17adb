"""A results folder that several processes fill, one cell at a time.

Each cell is evaluated in a working folder of its own, by the evaluation that `farspan eval` runs. Its rows
are added to the results folder when it is finished. A lock belongs to each cell, and one to the results
folder. The system drops the locks of a process that was killed, so that another one goes on with its cell:
what the killed process had finished stands in the working folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...attention.errors import FarspanError
from ..results import Results
from ..rows import parse_rows
from ..run import Summary
from ..task import Cell, Suite

Key = tuple[str, str]


class Shared:
    """The folder `out` of one evaluation. settings: what config.json holds; suite: whose rows it has.

    work: a hidden folder beside it for locks and working folders.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], suite: Suite) -> None:
        self.out, self.settings, self.suite = out, settings, suite
        self.work = out.parent / ".sweep" / out.name
        with _disk(self.work):
            self.work.mkdir(parents=True, exist_ok=True)

    def begin(self, keys: Mapping[str, Sequence[str]], session: Mapping[str, Any] | None = None) -> None:
        """Write down that this process begins, and which rows are asked for; collect what killed processes
        have left. session: what config.json says of the process. Raises ResultsError for a folder of another
        configuration."""
        with self._locked(), self._opened(log=True, session=session) as results:
            results.plan(keys)
        for folder in sorted(path for path in self.work.iterdir() if path.is_dir()):
            with self.cell_lock(folder.name) as mine:
                if mine:
                    self.collect(folder, {})

    def rows(self) -> dict[Key, dict[str, Any]]:
        """The rows of the results folder by key and method."""
        path = self.out / "samples.jsonl"
        with _disk(self.out):
            data = path.read_bytes() if path.exists() else b""
        rows, _ = parse_rows(data, path, self.suite.SHAPE)
        return {(row["key"], row["method"]): row for row in rows}

    @contextmanager
    def cell_lock(self, name: str) -> Iterator[bool]:
        """A context that yields whether this process has the cell of this (file) name for itself."""
        lock = FileLock(self.work / f"{name}.lock", timeout=0)
        try:
            with _disk(self.work):
                lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def seed(self, cell: Cell) -> Path:
        """The working folder of a cell, with the rows of it that the results folder has."""
        folder = self.work / file_name(cell)
        keys = set(cell.keys())
        mine = [row for (key, _), row in self.rows().items() if key in keys]
        with Results(folder, self.settings, row=self.suite.SHAPE, log=False) as results:
            _add(results, mine)
        return folder

    def collect(self, folder: Path, keys: Mapping[str, Sequence[str]], stopped: Sequence[str] = ()) -> None:
        """Add the rows of a working folder to the results folder, and remove it. keys: rows that are asked
        for from now on. stopped: sentences about methods that ended early. Raises ResultsError for a working
        folder of another configuration."""
        with Results(folder, self.settings, row=self.suite.SHAPE, log=False) as working:
            new = working.rows
        with self._locked(), self._opened() as results:
            _add(results, new)
            said = results.config.get("stopped", [])
            more = [sentence for sentence in stopped if sentence not in said]
            if more:
                results.config["stopped"] = [*said, *more]
            if keys or more:
                results.plan(keys)
        shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> Summary:
        """Write the summary, tables and pictures of the results folder."""
        with self._locked(), self._opened() as results:
            return self.suite.finish(results)

    @contextmanager
    def _opened(self, log: bool = False, session: Mapping[str, Any] | None = None) -> Iterator[Results]:
        with Results(self.out, self.settings, session=session, row=self.suite.SHAPE, log=log) as results:
            yield results

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _disk(self.work):
            lock = FileLock(self.work / "folder.lock")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _add(results: Results, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append the rows that the folder does not have."""
    known = {(row["key"], row["method"]) for row in results.rows}
    results.append([row for row in rows if (row["key"], row["method"]) not in known])


def file_name(cell: Cell) -> str:
    """A file name for a cell; the hash tells apart names that differ only in other characters."""
    digest = hashlib.sha256(cell.name.encode()).hexdigest()[:6]
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', cell.name)}-{digest}"


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        raise FarspanError(
            f"{folder} cannot be used: {error.strerror or error}; finished rows are kept, and the same "
            "command goes on once that is mended."
        ) from None
