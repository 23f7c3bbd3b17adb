"""The output folder: resume, torn lines, other configurations, disks that fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from farspan import FarspanError
from farspan.evals.results import ROW, Results, ResultsError, read
from farspan.evals.run import ANSWER, AT_DEPTH
from farspan.evals.settings import versions
from farspan.evals.shape import MAYBE_NUMBER, NUMBER, fill
from farspan.evals.summary import summarise

CONFIG = {"suite": "ruler", "seed": 1, "methods": ["dense"], "lengths": [64], "samples": 2}
FOLDERS = Path(__file__).parents[2] / "docs" / "results"


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
    with pytest.warns(UserWarning, match=r"The last line of .*samples\.jsonl is not whole"):
        results = Results(tmp_path, CONFIG)
    with results:
        assert results.rows == [row(0)]
        results.append([row(1)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(0), row(1)]


@pytest.mark.parametrize("tail", [b"\0" * 40, b'{"key": "ruler/vt/64/1", "met\xff\n', b"[" * 100_000])
def test_what_a_power_cut_leaves_at_the_end_is_a_torn_line_too(tmp_path: Path, tail: bytes) -> None:
    # Zeros are what some file systems leave: the length grew, the bytes did not arrive.
    with Results(tmp_path, CONFIG) as results:
        results.append([row(0)])
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(tail)
    with (
        pytest.warns(UserWarning, match="is dropped and computed again"),
        Results(tmp_path, CONFIG) as results,
    ):
        assert results.rows == [row(0)]


def damaged(**changes: Any) -> str:
    line = {**row(0), "length": 64, "nll": 0.5, "density": {"prefill": 1.0}} | changes
    return json.dumps({name: value for name, value in line.items() if value is not ...})


SHAPE = {**ROW, "length": int, "nll": MAYBE_NUMBER, "density": {"prefill": NUMBER}}


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"key": "ru', "it is not JSON"),
        ("\0\0\0\0", "it is not JSON"),
        ("null", "it is not JSON"),
        ("[1, 2]", "it is [1, 2]"),
        (damaged(key=7), "key is 7"),
        (damaged(method=...), "method is null"),
        (damaged(recipe=[1]), "recipe is [1]"),
        (damaged(length="64"), 'length is "64"'),
        (damaged(length=True), "length is true"),
        (damaged(nll="low"), 'nll is "low"'),
        (damaged(density=1.0), "density is 1.0"),
        (damaged(density={}), "prefill is null"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str, says: str) -> None:
    with Results(tmp_path, CONFIG, row=SHAPE):
        (tmp_path / "samples.jsonl").write_text(f"{damaged()}\n{line}\n{damaged()}\n")
    with pytest.raises(ResultsError) as caught:
        Results(tmp_path, CONFIG, row=SHAPE)
    assert f"line 2 of {tmp_path / 'samples.jsonl'} is damaged ({says})" in one_sentence(caught.value)
    (tmp_path / "samples.jsonl").write_text(f"{damaged()}\n{damaged(nll=None)}\n")
    Results(tmp_path, CONFIG, row=SHAPE).close()


def test_a_field_that_may_be_null_may_be_missing(tmp_path: Path) -> None:
    # A summary of such a row ended in a KeyError.
    bare = {"suite": "ppl", "task": "text", "length": 64, "gold_tokens": 3, "batch": 1, "steps": 3}
    bare |= {"key": "ppl/text/64/0", "method": "dense", "recipe": {}, "extra": {}, "density": {}}
    with Results(tmp_path, CONFIG, row=ANSWER) as results:
        results.append([{**bare, "seconds": {"prefill": 1.0, "decode": 0.5}}])
    with Results(tmp_path, CONFIG, row=ANSWER) as results:
        overall = summarise(results.config, results.rows)["overall"][0]
    assert overall["prefill_seconds"] == 1.0
    assert [overall[name] for name in ("score", "nll", "prefill_density", "kv_read")] == [None] * 4


@pytest.mark.parametrize(
    "extra, says", [({}, "depth is null"), ({"depth": 0.5, "true_depth": "x"}, 'true_depth is "x"')]
)
def test_a_needle_without_its_depth_is_damaged(tmp_path: Path, extra: dict, says: str) -> None:
    with Results(tmp_path, CONFIG) as results:
        results.append([{**row(0), "extra": extra}])
    shape = {**ROW, "extra": AT_DEPTH["extra"]}
    with pytest.raises(ResultsError, match=says):
        Results(tmp_path, CONFIG, row=shape)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"methods": "dense"}, 'methods is "dense"'),
        ({"methods": [["dense"]]}, 'methods is ["dense"]'),
        ({"sessions": {}}, "sessions is {}"),
        ({"sessions": [1]}, "sessions is 1"),
        ({"recipes": ["a"]}, 'recipes is ["a"]'),
        ({"planned": {"dense": 3}}, "dense is 3"),
        ({"lengths": [None]}, "lengths is null"),
        ({"identity": "ab"}, 'identity is "ab"'),
        ({"format": "one"}, 'format is "one"'),
    ],
)
def test_a_damaged_config_is_named(tmp_path: Path, change: dict, says: str) -> None:
    Results(tmp_path, CONFIG).close()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ResultsError) as caught:
        Results(tmp_path, CONFIG)
    assert f"{path} is damaged ({says})" in one_sentence(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe{}", b"[]", b'"x"', b"\0" * 9, b"[" * 100_000])
def test_a_config_that_is_no_config_is_named(tmp_path: Path, text: bytes) -> None:
    Results(tmp_path, CONFIG).close()
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ResultsError) as caught:
        Results(tmp_path, CONFIG)
    assert "config.json is not the config of a farspan evaluation" in one_sentence(caught.value)


def planned(out: Path, keys: dict[str, list[str]], rows: list[dict] = [], **changes: Any) -> list[str]:  # noqa: B006
    """A session that is asked for `keys` and finishes `rows`: the methods that it leaves unfinished."""
    with Results(out, CONFIG | {"methods": list(keys)} | changes) as results:
        results.plan(keys)
        results.append(rows)
        return results.unfinished()


def keys(count: int) -> list[str]:
    return [row(i)["key"] for i in range(count)]


def test_a_folder_is_unfinished_until_every_session_is(tmp_path: Path) -> None:
    both = {"dense": keys(2), "quest": keys(2)}
    assert planned(tmp_path, both, [row(0), row(1), row(0, "quest")]) == ["quest"]  # stopped
    assert planned(tmp_path, {"window": keys(3)}, [row(i, "window") for i in range(3)]) == ["quest"]
    assert planned(tmp_path, {"dense": keys(3)}, samples=3) == ["dense", "quest"]  # stopped
    assert planned(tmp_path, both) == ["dense", "quest"], "fewer samples do not take back what was asked for"
    assert planned(tmp_path, both, [row(1, "quest")]) == ["dense"]
    assert planned(tmp_path, {"dense": keys(3)}, [row(2)]) == []
    assert read(tmp_path)[0]["samples"] == 3


def test_a_session_that_was_stopped_before_its_plan_has_asked_for_nothing(tmp_path: Path) -> None:
    assert planned(tmp_path, {"dense": keys(1)}, [row(0)]) == []
    more = {"methods": ["dense", "quest"], "samples": 9, "lengths": [64, 128]}
    Results(tmp_path, CONFIG | more).close()
    assert planned(tmp_path, {"dense": keys(1)}) == []
    config = read(tmp_path)[0]
    assert (config["methods"], config["samples"], config["lengths"]) == (["dense"], 2, [64])
    assert len(config["sessions"]) == 3


IDENTITY = {"config": "c0", "weights": "w0", "tokenizer": "t0", "chat_template": None}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"weights": "w1"}, """the model's weights "w0" there, "w1" here"""),
        ({"config": "c1"}, """the model's config "c0" there, "c1" here"""),
        ({"chat_template": "x"}, """the model's chat_template null there, "x" here"""),
    ],
)
def test_another_model_of_the_same_name_is_refused(tmp_path: Path, change: dict, says: str) -> None:
    named = CONFIG | {"model": "chat", "rope": None}
    Results(tmp_path, named | {"identity": IDENTITY}).close()
    with pytest.raises(ResultsError) as caught:
        Results(tmp_path, named | {"identity": IDENTITY | change})
    assert f"({says})" in one_sentence(caught.value)
    Results(tmp_path, named | {"identity": IDENTITY, "model": "/other", "rope": "yarn:2"}).close()


def test_a_folder_without_an_identity_is_known_by_name_and_gets_one(tmp_path: Path) -> None:
    Results(tmp_path, CONFIG | {"model": "models/chat"}).close()
    with pytest.raises(ResultsError, match='model "models/chat" there, "chat" here'):
        Results(tmp_path, CONFIG | {"model": "chat", "identity": IDENTITY})
    Results(tmp_path, CONFIG | {"model": "./models//chat/", "identity": IDENTITY}).close()
    with pytest.raises(ResultsError, match="the model's weights"):
        Results(tmp_path, CONFIG | {"model": "models/chat", "identity": IDENTITY | {"weights": "w1"}})
    assert read(tmp_path)[0]["identity"] == IDENTITY


@pytest.mark.parametrize("name, complete", [("ruler_prefill", True), ("ruler", False)])
def test_folders_of_earlier_versions_resume(tmp_path: Path, name: str, complete: bool) -> None:
    """The committed folders: no identity, nothing planned."""
    for file in ("config.json", "samples.jsonl", "summary.json"):
        shutil.copy(FOLDERS / name / file, tmp_path)
    config, rows = read(tmp_path)
    config["versions"] = versions()
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = {name: value for name, value in config.items() if name not in ("sessions", "format", "versions")}
    with Results(tmp_path, wanted | {"identity": IDENTITY, "methods": ["dense"]}, row=ANSWER) as results:
        for line in rows:
            fill(line, ANSWER)
        assert results.rows == rows
        results.plan({"dense": [row["key"] for row in rows if row["method"] == "dense"]})
        assert results.done(rows[0]["key"], rows[0]["method"], rows[0]["recipe"])
        assert results.unfinished() == ([] if complete else config["methods"][1:])
    found = read(tmp_path)[0]
    assert found["identity"] == IDENTITY and found["methods"] == config["methods"]


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
    with Results(tmp_path, CONFIG | {"recipes": {}}) as results:
        results.plan({"dense": []})
    more = {"methods": ["quest:k=4"], "lengths": [128, 64], "samples": 1, "recipes": {"quest:k=4": "ab"}}
    with Results(tmp_path, CONFIG | more) as results:
        assert results.config["methods"] == ["dense", "quest:k=4"]
        assert results.config["lengths"] == [64, 128]
        assert results.config["samples"] == 2
        results.plan({"quest:k=4": []})
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
