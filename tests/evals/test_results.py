"""The output folder: resume, torn lines, other configurations, disks that fail."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from farspan import FarspanError
from farspan.evals.results import Results, ResultsError, read

CONFIG = {"suite": "ruler", "seed": 1, "methods": ["dense"], "lengths": [64], "samples": 2}


def row(index: int, method: str = "dense") -> dict:
    return {"key": f"ruler/vt/64/{index}", "method": method, "recipe": {"seed": index}, "score": 1.0}


def one_sentence(error: Exception) -> str:
    text = str(error)
    assert isinstance(error, FarspanError)
    assert "\n" not in text and text.endswith((".", ")."))
    return text


def test_rows_survive_reopening(tmp_path: Path) -> None:
    with Results(tmp_path / "a" / "b", CONFIG) as results:
        results.append([row(0), row(1)])
    with Results(tmp_path / "a" / "b", CONFIG) as results:
        assert results.rows == [row(0), row(1)]
        assert results.done("ruler/vt/64/0", "dense", {"seed": 0})
        assert not results.done("ruler/vt/64/0", "quest", {"seed": 0})
        assert not results.done("ruler/vt/64/2", "dense", {"seed": 2})
    assert len(read(tmp_path / "a" / "b")[0]["sessions"]) == 2


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path, cut: int) -> None:
    with Results(tmp_path, CONFIG) as results:
        results.append([row(0), row(1)])
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with Results(tmp_path, CONFIG) as results:
        assert results.rows == [row(0)]
        results.append([row(1)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(0), row(1)]


def test_zeros_at_the_end_are_a_torn_line_too(tmp_path: Path) -> None:
    # what some file systems leave after a power cut: the length grew, the bytes did not arrive
    with Results(tmp_path, CONFIG) as results:
        results.append([row(0)])
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b"\0" * 40)
    with Results(tmp_path, CONFIG) as results:
        assert results.rows == [row(0)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with Results(tmp_path, CONFIG) as results:
        results.append([row(0), row(1)])
    path = tmp_path / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + '{"key": "ru\n' + lines[1])
    with pytest.raises(ResultsError, match="line 2 of"):
        Results(tmp_path, CONFIG)


@pytest.mark.parametrize("name, value", [("seed", 2), ("suite", "needle"), ("model", "other")])
def test_another_configuration_is_refused_and_nothing_changes(
    tmp_path: Path, name: str, value: object
) -> None:
    with Results(tmp_path, CONFIG) as results:
        results.append([row(0)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResultsError) as caught:
        Results(tmp_path, CONFIG | {name: value})
    assert name in one_sentence(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_versions_are_refused(tmp_path: Path) -> None:
    Results(tmp_path, CONFIG).close()
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(ResultsError, match="versions"):
        Results(tmp_path, CONFIG)


def test_methods_and_sizes_may_be_added(tmp_path: Path) -> None:
    Results(tmp_path, CONFIG | {"recipes": {}}).close()
    more = {"methods": ["quest:k=4"], "lengths": [128, 64], "samples": 1, "recipes": {"quest:k=4": "ab"}}
    with Results(tmp_path, CONFIG | more) as results:
        assert results.config["methods"] == ["dense", "quest:k=4"]
        assert results.config["lengths"] == [64, 128]
        assert results.config["samples"] == 2
    with pytest.raises(ResultsError, match="recipe of quest"):
        Results(tmp_path, CONFIG | {"recipes": {"quest:k=4": "cd"}})


def test_a_sample_drawn_differently_is_refused(tmp_path: Path) -> None:
    with Results(tmp_path, CONFIG) as results:
        results.append([row(0)])
        with pytest.raises(ResultsError, match="another recipe"):
            results.done("ruler/vt/64/0", "dense", {"seed": 99})


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hello": 1}')
    with pytest.raises(ResultsError, match=r"config\.json"):
        Results(tmp_path, CONFIG)
    (tmp_path / "config.json").unlink()
    (tmp_path / "samples.jsonl").write_text("not ours\n")
    with pytest.raises(ResultsError, match="no config"):
        Results(tmp_path, CONFIG)
    assert (tmp_path / "samples.jsonl").read_text() == "not ours\n"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with Results(tmp_path, CONFIG), pytest.raises(ResultsError, match="another evaluation is writing"):
        Results(tmp_path, CONFIG)
    Results(tmp_path, CONFIG).close()


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(ResultsError, match="a file stands") as caught:
            Results(out, CONFIG)
        one_sentence(caught.value)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux's sysfs")
def test_an_unwritable_folder_is_one_sentence() -> None:
    with pytest.raises(ResultsError) as caught:  # nobody, root included, can make a folder in sysfs
        Results("/sys/kernel/farspan", CONFIG)
    assert "cannot be opened" in one_sentence(caught.value)


def test_a_read_only_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Results(tmp_path, CONFIG).close()

    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("farspan.evals.results.os.open", refuse)
    with pytest.raises(ResultsError) as caught:
        Results(tmp_path, CONFIG)
    assert "the disk is read-only" in one_sentence(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with Results(tmp_path, CONFIG) as results:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, results._lines)
        os.close(full)
        with pytest.raises(ResultsError) as caught:
            results.append([row(0)])
    assert "the disk is full" in one_sentence(caught.value)


def test_a_device_in_place_of_the_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").symlink_to("/dev/null")
    with pytest.raises(ResultsError, match="not a regular file"):
        Results(tmp_path, CONFIG)


def test_a_disk_that_fills_up_half_way_loses_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = os.write, [10]

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(fd, bytes(data)[: room[0]])
        room[0] -= written
        return written

    with Results(tmp_path, CONFIG) as results:
        results.append([row(0)])
        monkeypatch.setattr("farspan.evals.results.os.write", write)
        with pytest.raises(ResultsError, match="the disk is full"):
            results.append([row(1)])
        room[0] = 10_000
        results.append([row(2)])
    assert read(tmp_path)[1] == [row(0), row(2)]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with Results(tmp_path, CONFIG) as results:
        results.append([row(0) | {"nll": float("nan"), "seconds": {"decode": float("inf")}}])
    text = (tmp_path / "samples.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert read(tmp_path)[1][0]["nll"] is None
