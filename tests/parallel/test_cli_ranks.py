"""The `farspan` command under torchrun: printed and written once, and the same as in one process."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.cli import main
from farspan.evals import batch as forward
from farspan.evals.ranks import Job
from farspan.evals.ruler import rebuild
from farspan.evals.sample import encode
from farspan.evals.shared import under_each
from farspan.runtime.models import load

from . import launch

HERE = Path(__file__).parent

APART = {"seconds", "prefill_seconds", "decode_seconds", "step_ms", "sessions", "kv_read"}
CLOSE = 1e-4  # of likelihoods in float32, which sums in another order change

ROOT = HERE.parents[1]
RULER = ["eval", "ruler", "--model", "smollm2-135m", "--batch-size", "1"]
RULER += ["--recipe", str(ROOT / "docs" / "results" / "recipe")]
RULER_METHODS = "dense; double_sparsity:k=128; recycled:k=512,stride=10"
METHODS = "dense; window:w=64; recycled:k=64,stride=4; quest:k=64,dense_layers=0; block_topk:k=256"
TEXT = "It rained in the morning and the river rose. The mayor said nothing of the bridge. " * 300


def torchrun(size: int = 2, *more: str) -> list[str]:
    # a free port of its own: other jobs may run on this machine
    alone = ["--nproc-per-node", str(size), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [sys.executable, "-m", "torch.distributed.run", *alone, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, tiny_llama: Any, smollm2: Any) -> Path:
    """A random two-layer model with SmolLM2's tokenizer, and prose beside it."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llama(vocab_size=49152, max_position_embeddings=2048).save_pretrained(folder / "tiny")
    smollm2[1].save_pretrained(folder / "tiny")
    (folder / "prose.txt").write_text(TEXT)
    return folder


def alone(capsys: Any, monkeypatch: Any, arguments: list[str], stdin: str = "") -> tuple[int, str, str]:
    """A command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code or 0, *capsys.readouterr()


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """The same JSON up to what the clock says and what is compared by itself; numbers within rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one.keys() - APART:
            assert_same(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(one, float):
        assert other == pytest.approx(one, abs=CLOSE, rel=1e-5), where
    else:
        assert one == other, where


def rows(out: Path) -> dict[tuple[str, str], Any]:
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    found = {(row["key"], row["method"]): row for row in lines}
    assert len(found) == len(lines), "a result was written twice"
    return found


def assert_same_folder(one: Path, other: Path) -> None:
    """Two evaluations have written the same files with the same results."""
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
    for name in ("config.json", "summary.json"):
        assert_same(*(json.loads((out / name).read_text()) for out in (one, other)), name)
    mine, others = rows(one), rows(other)
    assert mine.keys() == others.keys()
    for key, row in mine.items():
        assert_same(row, others[key], str(key))
        # Pages' summaries are on both ranks, and each of them reads them all; keys are read once.
        twice = row["kv_read"] - row["density"]["decode"] if "quest" in row["method"] else 0
        assert others[key]["kv_read"] == pytest.approx(row["kv_read"] + twice), key


@pytest.fixture(scope="module")
def job(folder: Path) -> dict[str, list[tuple[int, str, str]]]:
    """By command, what each of two ranks has ended with and written."""
    tiny, text = str(folder / "tiny"), str(folder / "prose.txt")
    use = ["--model", tiny, "--text", text, "--dtype", "float32"]
    generate = ["generate", "--model", tiny, "--no-chat", "--max-new-tokens", "8"]
    small = [*use, "--lengths", "256", "--depths", "0,1", "--samples", "1"]

    def to(name: str) -> list[str]:
        return ["--out", str(folder / name)]

    (folder / "file").write_text("not a folder")
    made = ["--recipe", str(folder / "recipe"), "--methods", "dense; double_sparsity:k=16"]
    answers = ["--model", tiny, "--batch-size", "1", "--dtype", "float32", "--lengths", "512"]
    answers += ["--samples", "1", "--tasks", "niah_single_2", *made]
    windows = ["--lengths", "208", "--new-tokens", "8", "--samples", "3"]
    talks = ["--lengths", "640", "--turns", "2", "--samples", "1"]
    (folder / "prompts.jsonl").write_text(json.dumps(TEXT[:700]) + "\n" + json.dumps(TEXT[:400]) + "\n")
    asked = ["--dtype", "float32", "--prompts", str(folder / "prompts.jsonl"), "--new-tokens", "6"]
    speed = ["--lengths", "257", "--new-tokens", "4", "--repeats", "1", "--methods", "recycled:k=32,stride=2"]
    commands: dict[str, tuple[list[str], str]] = {
        "json": ([*generate, "--prompt-file", "-", "--json"], TEXT[:500]),
        "table": ([*generate, "--prompt", TEXT[:600], "--method", "recycled:k=32,stride=4"], ""),
        "ring": ([*generate, "--prompt", TEXT[:500], "--parallel", "ring", "--json"], ""),
        "none": ([*generate, "--prompt", TEXT[:500], "--parallel", "none", "--json"], ""),
        "empty": ([*generate], " "),
        "unknown": ([*generate, "--prompt", "x", "--method", "recicled"], ""),
        "usage": (["generate", "--bogus"], ""),
        "methods": (["methods", "--json"], ""),
        "tune": (["tune", "--model", tiny, "--methods", "quest"], ""),
        "calibrate": (["calibrate", *use, *to("recipe"), "--tokens", "256"], ""),
        "needle": (["eval", "needle", *small, *to("needle"), "--methods", METHODS, "--batch-size", "1"], ""),
        "ppl": (["eval", "ppl", *use, *to("ppl"), *windows, *made], ""),
        "turns": (["eval", "turns", *use, *to("turns"), *talks, "--methods", METHODS], ""),
        "fidelity": (["eval", "fidelity", *use[:2], *to("fidelity"), *asked, "--methods", METHODS], ""),
        "again": (["eval", "needle", *small, *to("needle"), "--methods", METHODS, "--json"], ""),
        "other": (["eval", "needle", *small, *to("needle"), "--seed", "7"], ""),
        "blocked": (["eval", "needle", *small, *to("file")], ""),
        "speed": (["eval", "speed", *use, *to("speed"), *speed], ""),
        "ruler": (["eval", "ruler", *answers, *to("ruler")], ""),
    }
    file = folder / "commands.json"
    file.write_text(json.dumps([[name, *given] for name, given in commands.items()]))
    [ended] = launch.commands([*torchrun(), str(HERE / "script_commands.py"), str(file)], within=400)
    assert ended.code == 0, ended
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [tuple(rank[name]) for rank in ranks] for name in commands}


def test_json_is_one_document(job: Any, folder: Path, capsys: Any, monkeypatch: Any):
    generate = ["generate", "--model", str(folder / "tiny"), "--no-chat", "--max-new-tokens", "8", "--json"]
    _, out, _ = alone(capsys, monkeypatch, [*generate, "--prompt-file", "-"], TEXT[:500])
    want = json.loads(out)
    for name, ranks in (("json", 2), ("ring", 2), ("none", 1)):
        [(code, printed, _), other] = job[name]
        found = json.loads(printed)
        assert code == 0 and other == (0, "", "")
        assert found["ranks"] == ranks and found["text"] == want["text"], name
        for phase in ("prefill_density", "decode_density"):
            assert found["report"]["summary"][phase] == want["report"]["summary"][phase] == 1
    assert json.loads(job["ring"][0][1])["report"]["summary"]["mechanisms"].keys() == {"ring", "decode"}


def test_generate_prints_once(job: Any, folder: Path, capsys: Any, monkeypatch: Any):
    commands = {given[0]: given[1] for given in json.loads((folder / "commands.json").read_text())}
    code, out, err = alone(capsys, monkeypatch, commands["table"])
    [(spread_code, spread_out, spread_err), _] = job["table"]
    assert code == spread_code == 0, job["table"]
    assert out == spread_out
    assert spread_err.count("what attention read") == 1 and " over 2 ranks" in spread_err
    table = [line for line in err.splitlines() if line.startswith("0-1 ")]
    assert table == [line for line in spread_err.splitlines() if line.startswith("0-1 ")]  # keys of all ranks


def test_only_rank_0_writes(job: Any):
    for name, [(code, out, _), (other_code, other_out, other_err)] in job.items():
        assert other_out == "", name
        if code == 0:
            assert out or name == "calibrate", name
            assert other_code == 0 and other_err == "", name
    assert len(json.loads(job["methods"][0][1])) > 3
    assert "Saved the recipe" in job["calibrate"][0][2]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("empty", "The prompt is empty"),
        ("unknown", "did you mean 'recycled'"),
        ("tune", "a launcher has started 2 ranks"),
        ("other", "seed"),
        ("blocked", "a file stands where a folder is needed"),
    ],
)
def test_an_error_is_said_once(job: Any, name: str, part: str):
    assert [code for code, _, _ in job[name]] == [2, 2]
    said = [line for _, _, err in job[name] for line in err.splitlines() if line.strip()]
    assert len(said) == 1 and said[0].startswith("farspan: ") and part in said[0]


def test_wrong_usage_is_said_once(job: Any):
    [(code, _, err), other] = job["usage"]
    assert code == 2 and "--bogus" in err and other == (2, "", "")


@pytest.mark.parametrize("name", ["needle", "ppl", "turns", "fidelity", "ruler"])
def test_an_evaluation_writes_what_one_process_writes(
    job: Any, folder: Path, tmp_path: Path, name: str, capsys: Any, monkeypatch: Any
):
    assert job[name][0][0] == 0, job[name]
    commands = {given[0]: given[1] for given in json.loads((folder / "commands.json").read_text())}
    arguments = [str(tmp_path / name) if item == str(folder / name) else item for item in commands[name]]
    assert alone(capsys, monkeypatch, arguments)[0] == 0
    assert_same_folder(tmp_path / name, folder / name)


def test_what_is_done_is_not_done_again(job: Any, folder: Path):
    [(code, printed, _), _] = job["again"]
    assert code == 0 and json.loads(printed) == json.loads((folder / "needle" / "summary.json").read_text())
    assert len(rows(folder / "needle")) == 2 * 5
    sessions = json.loads((folder / "needle" / "config.json").read_text())["sessions"]
    assert [session["ranks"] for session in sessions] == [2, 2]


def test_speed_is_of_the_spread_model(job: Any, folder: Path):
    assert job["speed"][0][0] == 0, job["speed"]
    data = json.loads((folder / "speed" / "summary.json").read_text())
    dense, recycled = data["overall"]
    assert (data["ranks"], data["baseline"], dense["method"]) == (2, "dense", "dense")
    layers, heads, kv_heads, dim, hidden, size = 2, 8, 2, 16, 128, 4
    half = 128  # of the 256 tokens in prefill
    keys = layers * half * 2 * kv_heads * dim * size
    assert dense["prefill_sent_bytes"] == keys + hidden * size  # and the last hidden state from one rank
    assert dense["decode_sent_bytes_per_token"] == layers * heads * (dim * size + 4)
    assert recycled["decode_sent_bytes_per_token"] > dense["decode_sent_bytes_per_token"]
    assert recycled["decode_density"] < 1 and all(
        row["peak_memory_bytes"] > 1 << 20 for row in data["overall"]
    )
    assert "over the same 2 ranks" in (folder / "speed" / "speed.md").read_text()


@pytest.mark.slow
def test_restarted_ranks_resume(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    """Rank 0 dies in the first attempt, rank 1 in the second; torchrun starts all of them anew."""
    use = ["--model", str(folder / "tiny"), "--text", str(folder / "prose.txt"), "--dtype", "float32"]
    needle = ["eval", "needle", *use, "--lengths", "256", "--depths", "0,1", "--samples", "4"]
    needle += ["--batch-size", "1", "--methods", "dense; window:w=64"]
    out = tmp_path / "restarted"
    script = [str(HERE / "script_dying.py"), str(out), "3", *needle, "--out", str(out)]
    [ended] = launch.commands([*torchrun(2, "--max-restarts", "2"), *script], within=300)
    assert ended.code == 0, ended
    whole = (out / "samples.jsonl").read_text()
    assert len(rows(out)) == 2 * 4 * 2
    for attempt in (0, 1):
        left = (tmp_path / f"restarted.{attempt}").read_text()
        done = left[: left.rfind("\n") + 1]  # the last line may not have been whole yet
        assert 3 * (attempt + 1) <= done.count("\n") < 16, "the rank did not die in the middle"
        assert whole.startswith(done), "a finished result was done again"
    sessions = json.loads((out / "config.json").read_text())["sessions"]
    assert len(sessions) == 3
    assert alone(capsys, monkeypatch, [*needle, "--out", str(tmp_path / "alone")])[0] == 0
    assert_same_folder(tmp_path / "alone", out)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ruler_answers(size: int, dtype: str, tmp_path: Path, capsys: Any, monkeypatch: Any):
    """SmolLM2 over ranks answers as on one device. In bfloat16 an answer may go another way from a step on
    where two tokens are closer than bfloat16 can tell (twice what it is off on one device)."""
    arguments = [*RULER, "--lengths", "1024", "--tasks", "niah_single_2,vt", "--methods", RULER_METHODS]
    arguments += ["--samples", "2", "--dtype", dtype, "--out"]
    spread = [*torchrun(size), "-m", "farspan", *arguments, str(tmp_path / "ranks")]
    [ended] = launch.commands(spread, within=1200)
    assert ended.code == 0, ended
    assert alone(capsys, monkeypatch, [*arguments, str(tmp_path / "alone")])[0] == 0
    if dtype == "float32":
        return assert_same_folder(tmp_path / "alone", tmp_path / "ranks")
    mine, others = rows(tmp_path / "alone"), rows(tmp_path / "ranks")
    assert mine.keys() == others.keys()
    for key, row in mine.items():
        if row["answer"] != others[key]["answer"]:
            gap, error = at_the_parting(row, others[key]["answer"])
            assert gap < 2 * error, f"{key}: {row['answer']!r}, over ranks {others[key]['answer']!r}"


def at_the_parting(row: dict[str, Any], other: str) -> tuple[float, float]:
    """Where one device's answer and another part: (the gap between the logits of the two likeliest tokens in
    float32, how far bfloat16 is off on such gaps, at most over the steps of the answer)."""
    reduced, tokenizer = load("smollm2-135m")
    exact, _ = load("smollm2-135m", dtype="float32")
    sample = rebuild(tokenizer, row["recipe"])
    tokens, logits = answered(reduced, tokenizer, sample, row["method"], row["tokens"] + 1)
    texts = [tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(row["tokens"] + 1)]
    assert texts[-1] == row["answer"]
    parting = max(n for n, text in enumerate(texts) if other.startswith(text))
    _, wanted = answered(exact, tokenizer, sample, row["method"], row["tokens"] + 1, along=tokens)
    first, second = wanted.topk(2).indices[:, :, None].unbind(1)
    gaps, found = (x.gather(1, first) - x.gather(1, second) for x in (wanted, logits))
    return float(gaps[parting]), float((found - gaps).abs().max())


def answered(
    model: Any, tokenizer: Any, sample: Any, method: str, steps: int, along: list[int] | None = None
) -> tuple[list[int], torch.Tensor]:
    """Tokens of the greedy answer (or those of ``along``) and the logits [steps, V] they are chosen by, as an
    evaluation computes them on one device."""
    prompt, recipe = encode(tokenizer, sample), RULER[-1]
    batch = forward.collate([prompt], 0, model.device)

    def measure(_: Any, started: Any) -> tuple[list[int], torch.Tensor]:
        cache, fed, logits = started.take(), prompt[-1:], []
        for step in range(steps):
            with torch.no_grad():
                out = model(
                    torch.tensor([fed[-1:]]),
                    attention_mask=torch.ones(1, len(prompt) + step).long(),
                    past_key_values=cache,
                    use_cache=True,
                )
            logits.append(out.logits[0, -1].float())
            fed.append(int(logits[-1].argmax()) if along is None else along[step])
        return fed[1:], torch.stack(logits)

    [(_, found)] = under_each(model, batch, [method], recipe, measure, Job(model))
    return found
