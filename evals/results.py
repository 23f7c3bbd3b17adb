"""The output folder of an evaluation: written as it goes, resumed after a stop, refused when it is another
run's.

    DIR/config.json     what was run (model, dtype, seed, sizes, methods, versions) and each session's machine
    DIR/samples.jsonl   one line per finished (sample, method): the only thing that cannot be recomputed
    cheaply DIR/summary.json    written at the end of a session from the two files above, with tables and
    pictures beside it

Lines are appended in whole blocks and synced, so what is on the disk is valid after Ctrl-C, `kill -9` or a
power cut, but for a torn last line, which the next session drops and computes again.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from .ranks import Job

FORMAT = 1
GROWING = ("methods", "recipes", "lengths", "tasks", "depths", "samples")
"""Settings that may grow from session to session: they add rows and change the meaning of none already
written."""
VERSIONED = ("farspan", "torch", "transformers")


class ResultsError(FarspanError):
    """The output folder cannot be used: another configuration's, unreadable, read-only, full, or in use."""


class Results:
    """An open output folder.

    config: JSON-able settings that give the numbers their meaning. Every setting but `GROWING` must equal the
    folder's; lists in `GROWING` are united and `samples` is the larger of the two.
    Raises ResultsError, with one sentence, for anything wrong with the folder.
    """

    def __init__(
        self, out: str | Path, config: Mapping[str, Any], *, session: Mapping[str, Any] | None = None
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
            self.config = wanted if found is None else self._united(found, wanted)
            self.config.setdefault("sessions", []).append({**environment(), **(session or {})})
            with self._disk("read"):
                self._read_rows(orphan=found is None)
            self._write_json("config.json", self.config)
        except BaseException:
            self.close()
            raise
        self._done = {(row["key"], row["method"]): row["recipe"] for row in self.rows}

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lines >= 0:
            os.close(self._lines)
            self._lines = -1

    def done(self, key: str, method: str, recipe: Mapping[str, Any]) -> bool:
        """Whether the pair is on the disk already; refuses a folder whose sample of that key was another
        prompt."""
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
        """Append finished rows as one block and sync it; on failure the file is left as it was before the
        call."""
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

    def write_text(self, name: str, text: str) -> None:
        """Replace DIR/name by text, at once or not at all."""
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
            if not path.exists():
                return None
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found = None
        if not isinstance(found, dict) or "format" not in found:
            raise ResultsError(
                f"{path} is not the config of a farspan evaluation; give an empty or new --out folder."
            )
        return found

    def _united(self, found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
        differing = [
            f"{name} {_short(found.get(name))} there, {_short(wanted.get(name))} here"
            for name in sorted(set(found) | set(wanted))
            if name not in GROWING and name != "sessions" and found.get(name) != wanted.get(name)
        ]
        old, new = found.get("recipes", {}), wanted.get("recipes", {})
        differing += [
            f"recipe of {spec} {old[spec]} there, {new[spec]} here"
            for spec in new
            if old.get(spec, new[spec]) != new[spec]
        ]
        if differing:
            raise ResultsError(
                f"{self.out} holds an evaluation of another configuration ({'; '.join(differing)}); only "
                f"{', '.join(GROWING)} may be added to a folder: give another --out."
            )
        united = dict(found)
        for name in GROWING:
            old, new = found.get(name), wanted.get(name)
            if isinstance(old, list) and isinstance(new, list):
                united[name] = old + [item for item in new if item not in old]
            elif isinstance(old, dict) and isinstance(new, dict):
                united[name] = old | new
            elif isinstance(old, int) and isinstance(new, int):
                united[name] = max(old, new)
            elif new is not None:
                united[name] = new
        return united

    def _read_rows(self, *, orphan: bool) -> None:
        """Read samples.jsonl; a torn last line (a session killed while writing) is cut off the file."""
        path = self.out / "samples.jsonl"
        data = path.read_bytes()
        if orphan and data.strip():
            raise ResultsError(
                f"{path} has rows but no config.json beside it; give an empty or new --out folder."
            )
        start = 0
        while start < len(data):
            end = data.find(b"\n", start)
            row = _row(data[start : end if end >= 0 else len(data)])
            if end < 0 or (row is None and end == len(data) - 1):
                break
            if row is None:
                number = data.count(b"\n", 0, start) + 1
                raise ResultsError(
                    f"line {number} of {path} is damaged; delete that line to have it computed again."
                )
            self.rows.append(row)
            start = end + 1
        self._size = start
        if start < len(data):
            os.ftruncate(self._lines, start)
            os.fsync(self._lines)

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
    """The folder as the other ranks of a job know it: the first one's rows, and nothing written."""

    def __init__(self, out: str | Path, config: dict[str, Any], rows: list[dict[str, Any]]):
        self.out, self.config, self.rows = Path(out), config, rows
        self._lines, self._size = -1, 0
        self._done = {(row["key"], row["method"]): row["recipe"] for row in rows}

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of rows that the first rank has written."""
        self._note([json.loads(json.dumps(_finite(row))) for row in rows], 0)


def open_results(
    job: Job, out: str | Path, config: Mapping[str, Any], *, session: Mapping[str, Any] | None = None
) -> Results:
    """The folder `out`, opened by the first rank of the job for all of them: what is done is the same on
    every rank. Raises, on all ranks, what `Results` raises, and FarspanError where their settings differ."""
    job.agree("the settings of the evaluation", json.dumps(dict(config)))
    opened: list[Results] = []

    def begin() -> Any:
        ranks = {"ranks": job.size} if job.size > 1 else {}
        opened.append(Results(out, config, session={**(session or {}), **ranks}))
        return [opened[0].config, opened[0].rows] if job.size > 1 else None

    found = job.decide(begin)
    return opened[0] if opened else Replica(out, *found)


def record(job: Job, results: Results, rows: list[dict[str, Any]]) -> None:
    """Append finished rows; the other ranks go on when the first has them on its disk, and stop where it
    fails."""
    job.decide(lambda: results.append(rows))
    if isinstance(results, Replica):
        results.append(rows)


def read(out: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config and the rows of a folder, changing nothing (a torn last line is skipped)."""
    path = Path(out)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        lines = (path / "samples.jsonl").read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} is not a farspan evaluation folder ({error}).") from error
    return config, [row for row in map(_row, lines) if row is not None]


def versions() -> dict[str, str]:
    """The versions that decide the numbers; a folder is not continued under others."""
    out = {}
    for name in VERSIONED:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def environment() -> dict[str, Any]:
    """The machine of this session: what seconds depend on."""
    import torch

    from ..runtime.machine import cpu_name

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"key", "method", "recipe"} <= set(row) else None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
