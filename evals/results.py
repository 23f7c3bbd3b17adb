"""The output folder of an evaluation: written step by step, resumed after a stop, refused for another
configuration.

    DIR/config.json     what was run (model, dtype, seed, sizes, methods, versions), which rows were asked
                        for, and each session's machine
    DIR/samples.jsonl   one line per finished (sample, method): the only thing that cannot be recomputed
                        cheaply
    DIR/summary.json    written at the end of a session from the two files above, with tables and pictures
                        beside it

Lines are appended in whole blocks and synced. So the file is valid after Ctrl-C, `kill -9` or a power cut,
except for an incomplete last line: the next session drops it with a warning and computes it again.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .ranks import Job
from .rows import ROW, ResultsError, parse, parse_config, parse_rows
from .settings import GROWING, differences, environment, grown, versions
from .shape import Shape, misfit
from .track import track

FORMAT = 1


class Results:
    """An open output folder.

    config: JSON-able settings that give the numbers their meaning. All but those in `GROWING` must equal the
    folder's settings. The growing ones are united with the folder's; `plan` writes the result to config.json.
    The model is compared by `identity` (see identity.py), or by name if one side has no identity.
    row: the shape that rows must have. log: whether config.json lists this session.
    Raises ResultsError, with one sentence, for anything wrong with the folder.
    """

    def __init__(
        self,
        out: str | Path,
        config: Mapping[str, Any],
        *,
        session: Mapping[str, Any] | None = None,
        row: Shape = ROW,
        log: bool = True,
    ):
        self.out = Path(out)
        self.rows: list[dict[str, Any]] = []
        self._lines = -1
        self._size = 0
        wanted = json.loads(json.dumps({"format": FORMAT, **config, "versions": versions()}))
        with self._disk("opened"):
            self.out.mkdir(parents=True, exist_ok=True)
            self._lines = os.open(self.out / "samples.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(self._lines).st_mode):  # a device may have no end to read to
                raise ResultsError(f"{self.out / 'samples.jsonl'} is not a regular file; give another --out.")
            self._lock()
            found = self._read_config()
            if found is not None:
                self._check_same(found, wanted)
            with self._disk("read"):
                self._read_rows(row, orphan=found is None)
            self._done = {(row["key"], row["method"]): row["recipe"] for row in self.rows}
            written = {name: value for name, value in wanted.items() if name not in GROWING} | (found or {})
            written["identity"] = written.get("identity") or wanted.get("identity")
            begun = [environment() | dict(session or {})] if log else []
            written["sessions"] = [*written.get("sessions", []), *begun]
            if "planned" not in written:
                written["planned"] = self._planned_before()
            self._write_json("config.json", written)
            self.config = grown(written, wanted)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lines >= 0:
            os.close(self._lines)
            self._lines = -1

    def plan(self, keys: Mapping[str, Iterable[str]]) -> None:
        """Write to config.json what this session asks for: the grown settings, and the sample keys by method.

        A session that ends before this call leaves only its entry in the list of sessions.
        """
        planned = {method: dict(cells) for method, cells in self.config["planned"].items()}
        for method, asked in keys.items():
            cells = planned.setdefault(method, {})
            for cell, count in Counter(map(_cell, asked)).items():
                cells[cell] = max(count, cells.get(cell, 0))
        self.config["planned"] = planned
        self._write_json("config.json", self.config)

    def unfinished(self) -> list[str]:
        """The methods that lack rows which this or an earlier session asked for."""
        finished = self._counts()
        planned = self.config["planned"]
        return [
            method
            for method in dict.fromkeys([*self.config.get("methods", []), *planned])
            if method not in planned
            or any(finished[method, cell] < count for cell, count in planned[method].items())
        ]

    def done(self, key: str, method: str, recipe: Mapping[str, Any]) -> bool:
        """Whether the row of this sample and method is on the disk.

        Raises ResultsError if the folder's sample of that key has another recipe.
        """
        written = self._done.get((key, method))
        if written is None:
            return False
        if written != json.loads(json.dumps(recipe)):
            raise ResultsError(
                f"sample {key} in {self.out} was drawn from another recipe than this run's (another "
                "haystack, seed or version of the generator); give another --out, or the settings in that "
                "folder's config.json."
            )
        return True

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append finished rows as one block, and sync it. After an error the file is as it was before."""
        block = [json.loads(json.dumps(_finite(row))) for row in rows]
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in block).encode()
        left = memoryview(data)
        with self._disk("written"):
            try:
                while left:
                    left = left[os.write(self._lines, left) :]
                os.fsync(self._lines)
            except BaseException as error:
                if left or isinstance(error, OSError):
                    with suppress(OSError):
                        os.ftruncate(self._lines, self._size)
                else:  # Ctrl-C with everything written
                    self._note(block, len(data))
                raise
        self._note(block, len(data))

    def _note(self, block: list[dict[str, Any]], size: int) -> None:
        self._size += size
        self.rows += block
        self._done.update({(row["key"], row["method"]): row["recipe"] for row in block})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write_json("summary.json", _finite(summary))
        track(self.out, _finite(summary))

    def write_text(self, name: str, text: str) -> None:
        """Replace DIR/name by the text in one step."""
        with self._disk("written"):
            scratch = self.out / f".{name}.part"
            with scratch.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self.out / name)

    @contextmanager
    def picture(self, name: str) -> Iterator[Path]:
        """The path to save a picture to; an OSError while saving becomes a sentence."""
        with self._disk("written"):
            yield self.out / name

    def _write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def _read_config(self) -> dict[str, Any] | None:
        path = self.out / "config.json"
        with self._disk("read"):
            return parse_config(path.read_bytes(), path) if path.exists() else None

    def _check_same(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        if differing := differences(found, wanted):
            raise ResultsError(
                f"{self.out} holds an evaluation of another configuration ({'; '.join(differing)}); only "
                f"{', '.join(GROWING)} may be added to a folder: give another --out."
            )

    def _read_rows(self, shape: Shape, *, orphan: bool) -> None:
        """Read samples.jsonl. An incomplete last line (of a session killed while writing) is cut off."""
        path = self.out / "samples.jsonl"
        data = path.read_bytes()
        if orphan and data.strip():
            raise ResultsError(
                f"{path} has rows but no config.json beside it; give an empty or new --out folder."
            )
        self.rows, self._size = parse_rows(data, path, shape)
        if self._size < len(data):
            warnings.warn(
                f"The last line of {path} is not whole, as a stop while writing leaves it: it is dropped and "
                "computed again.",
                stacklevel=2,
            )
            os.ftruncate(self._lines, self._size)
            os.fsync(self._lines)

    def _planned_before(self) -> dict[str, dict[str, int]]:
        """The plan of a folder of an earlier version, which did not record it.

        It is the rows that exist, if the summary says that all were finished; empty otherwise.
        """
        planned: dict[str, dict[str, int]] = {}
        try:
            summary = parse((self.out / "summary.json").read_bytes())
        except OSError:
            return planned
        if isinstance(summary, dict) and summary.get("complete") and summary.get("rows") == len(self.rows):
            for (method, cell), count in self._counts().items():
                planned.setdefault(method, {})[cell] = count
        return planned

    def _counts(self) -> Counter[tuple[str, str]]:
        """The number of samples on the disk by (method, cell)."""
        return Counter((method, _cell(key)) for key, method in self._done)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(
                f"another evaluation is writing to {self.out}; wait for it or give another --out."
            ) from None
        except OSError:  # a file system without locks
            return

    @contextmanager
    def _disk(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = {
                errno.ENOSPC: "the disk is full",
                errno.EDQUOT: "the disk quota is used up",
                errno.EROFS: "the disk is read-only",
                errno.EACCES: "it is not writable for this user",
                errno.EPERM: "it is not writable for this user",
                errno.ENOTDIR: "a file stands where a folder is needed",
                errno.EEXIST: "a file stands where a folder is needed",
            }.get(error.errno or 0, error.strerror or str(error))
            raise ResultsError(
                f"the output folder {self.out} cannot be {verb}: {reason}; rows already written are kept, "
                "and the same command resumes once that is mended (or give another --out)."
            ) from error


class Replica(Results):
    """The folder on the other ranks of a job: it has the first rank's rows and writes nothing."""

    def __init__(self, out: str | Path, config: dict[str, Any], rows: list[dict[str, Any]]):
        self.out, self.config, self.rows = Path(out), config, rows
        self._lines, self._size = -1, 0
        self._done = {(row["key"], row["method"]): row["recipe"] for row in rows}

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows that the first rank has written."""
        self._note([json.loads(json.dumps(_finite(row))) for row in rows], 0)

    def write_text(self, name: str, text: str) -> None:
        """Nothing: the first rank writes."""


def open_results(
    job: Job,
    out: str | Path,
    config: Mapping[str, Any],
    *,
    session: Mapping[str, Any] | None = None,
    row: Shape = ROW,
) -> Results:
    """The folder `out`, opened by the first rank for all ranks, so that all agree on what is done.

    Raises, on all ranks, what `Results` raises, and FarspanError if the settings of the ranks differ.
    """
    job.agree("the settings of the evaluation", json.dumps(dict(config)))
    opened: list[Results] = []

    def begin() -> Any:
        ranks = {"ranks": job.size} if job.size > 1 else {}
        opened.append(Results(out, config, session={**(session or {}), **ranks}, row=row))
        return [opened[0].config, opened[0].rows] if job.size > 1 else None

    found = job.decide(begin)
    return opened[0] if opened else Replica(out, *found)


def plan(job: Job, results: Results, keys: Mapping[str, list[str]]) -> None:
    """`results.plan` on every rank. The first rank writes; if that fails, all ranks raise."""
    job.decide(lambda: results.plan(keys))
    if isinstance(results, Replica):
        results.plan(keys)


def record(job: Job, results: Results, rows: list[dict[str, Any]]) -> None:
    """Append finished rows on every rank. The first rank writes; if that fails, all ranks raise."""
    job.decide(lambda: results.append(rows))
    if isinstance(results, Replica):
        results.append(rows)


def read(out: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config and the rows of a folder. It changes nothing; an incomplete last line is skipped."""
    path = Path(out)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        lines = (path / "samples.jsonl").read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} is not a farspan evaluation folder ({error}).") from error
    return config, [row for row in map(parse, lines) if misfit(row, ROW, "it") is None]


def unfinished_note(data: Mapping[str, Any]) -> list[str]:
    """A sentence about a summary that lacks rows; none for a complete one."""
    if data.get("complete", True):
        return []
    missing = "; ".join(data.get("unfinished", ()))
    return [f"Stopped before the end: run the same command to resume (unfinished: {missing})."]


def _cell(key: str) -> str:
    return key.rpartition("/")[0]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
