"""The runner: its two scores against the unpatched model, one shared prefill, and runs that are stopped."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan.evals import batch as forward
from farspan.evals import memory
from farspan.evals.results import ResultsError, read
from farspan.evals.run import plan, run
from farspan.evals.sample import encode, encode_gold
from farspan.evals.shared import recipes

TINY = Path(__file__).with_name("tiny.py")
_spec = importlib.util.spec_from_file_location("farspan_tests_tiny", TINY)
assert _spec is not None and _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

CONFIG = {"suite": "ruler", "seed": 1, "samples": 4}
RECYCLED = tiny.METHODS[1]


@pytest.fixture
def model() -> Any:
    return tiny.tiny_model()


def evaluate(model: Any, out: Path, **changes: Any) -> Any:
    asked = {"samples": changes.pop("samples", tiny.samples()), "batch_size": changes.pop("batch_size", 3)}
    methods = changes.pop("methods", tiny.METHODS)
    return run(tiny.setup(model, methods, out, **({"config": CONFIG} | changes)), **asked)


def comparable(rows: list[dict]) -> list[dict]:
    """Rows without the clock, in one order."""
    timeless = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return sorted(timeless, key=lambda row: (row["method"], row["key"]))


def test_dense_scores_are_the_unpatched_models(model: Any, tmp_path: Path) -> None:
    evaluate(model, tmp_path, methods=["dense"])
    tokenizer, rows = tiny.CharTokenizer(), {row["key"]: row for row in read(tmp_path)[1]}
    assert len(rows) == 8
    for sample in tiny.samples():
        prompt, gold = encode(tokenizer, sample), encode_gold(tokenizer, sample)
        row = rows[f"ruler/{sample.task}/128/{sample.index}"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + gold])).logits[0].float().log_softmax(-1)
            answer = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)).long(),
                max_new_tokens=12,
                do_sample=False,
            )[0, len(prompt) :]
        nll = -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(gold))
        assert row["nll_sum"] == pytest.approx(nll, abs=2e-4)
        assert row["nll"] == pytest.approx(nll / len(gold), abs=2e-4)
        kept = [token for token in answer.tolist() if token != tiny.EOS]
        assert row["answer"] == tokenizer.decode(kept)
        assert row["score"] == sum(letter in row["answer"].strip().lower() for letter in "ae") / 2
        assert row["density"] == {"prefill": 1.0, "decode": 1.0}


def test_methods_are_scored_through_their_own_decode_path(model: Any, tmp_path: Path) -> None:
    # Oracle: a user's own patch, one unpadded row, prefill and one token per call, no sharing and no batch.
    # Recycled's last prompt token is a full step, by which it builds its set: as if the prefill ended there.
    evaluate(model, tmp_path)
    tokenizer, rows = tiny.CharTokenizer(), {(r["key"], r["method"]): r for r in read(tmp_path)[1]}
    for spec in tiny.METHODS[1:]:
        for sample in tiny.samples()[:3]:
            prompt, gold = encode(tokenizer, sample), encode_gold(tokenizer, sample)
            with farspan.patch(model, spec) as patched, torch.no_grad():
                cut = len(prompt) - (spec != RECYCLED)
                output = model(torch.tensor([prompt[:cut]]), use_cache=True)
                fed, logits = [*prompt[cut:], *gold], [output.logits[0, -1]] if cut == len(prompt) else []
                patched.reset_report()
                for token in fed[:-1]:
                    call = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
                    logits.append(call.logits[0, -1])
                steps = zip(logits, gold, strict=True)
                nll = -sum(float(row.log_softmax(-1)[target]) for row, target in steps)
                density = patched.report().summary["decode_density"]
            row = rows[f"ruler/{sample.task}/128/{sample.index}", spec]
            assert row["nll_sum"] == pytest.approx(nll, abs=1e-3), spec
            assert density < 1 and row["density"]["decode"] < 1, spec


def test_sparse_methods_do_differ_from_dense(model: Any, tmp_path: Path) -> None:
    # guards the tests above: with flat attention every method would agree and nothing be tested
    data = evaluate(model, tmp_path).data
    for row in data["methods"][1:]:
        assert abs(row["nll_diff"]["mean"]) > 1e-3


def test_one_dense_prefill_serves_all_decode_methods(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = forward.prefill
    monkeypatch.setattr(forward, "prefill", lambda m, b: calls.append(b.ids.shape[0]) or real(m, b))
    evaluate(model, tmp_path, batch_size=4)
    assert calls == [4, 4] * 2  # two cells of one batch: one shared prefill and the window's own


def test_the_model_is_left_as_it_was(model: Any, tmp_path: Path) -> None:
    ids = torch.arange(3, 40)[None]
    before, implementation = model(ids).logits, model.config._attn_implementation
    model.train()
    evaluate(model, tmp_path)
    assert model.training and model.config._attn_implementation == implementation
    assert torch.equal(model.eval()(ids).logits, before)


def test_order_is_balanced_over_cells(model: Any) -> None:
    batches = plan(model, [tiny.sample(t, i) for t in ("vt", "cwe") for i in range(5)], 2)
    assert [(b[0].task, [s.index for s in b]) for b in batches] == [
        ("vt", [0, 1]), ("cwe", [0, 1]), ("vt", [2, 3]), ("cwe", [2, 3]), ("vt", [4]), ("cwe", [4]),
    ]  # fmt: skip


def test_automatic_batches_follow_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 layers x 2 (K and V) x 2 heads x 16 x 4 bytes x 100 tokens
    assert memory.kv_bytes(model, 100) == 2 * 2 * 2 * 16 * 4 * 100
    monkeypatch.setattr(memory, "available_memory", lambda device: 1 << 40)
    assert memory.batch_rows(model, 128, 20) == 10
    assert memory.batch_rows(model, 128, 11) == 6  # 6 + 5, not 10 + 1
    row = memory.COPIES * memory.kv_bytes(model, 128) + memory.activation_bytes(model, 128)
    monkeypatch.setattr(memory, "available_memory", lambda device: 2 * 3 * row)
    assert memory.batch_rows(model, 128, 9) == 3
    monkeypatch.setattr(memory, "available_memory", lambda device: 0)
    assert memory.batch_rows(model, 128, 9) == 1
    monkeypatch.undo()
    assert memory.available_memory(model.device) > 1 << 20


def test_answers_stop_at_end_tokens_only() -> None:
    tokenizer = tiny.CharTokenizer()
    named = type("M", (), {"generation_config": type("G", (), {"eos_token_id": [7, 2]})()})()
    assert forward.end_tokens(named, tokenizer) == [2, 7]
    chat = type("T", (tiny.CharTokenizer,), {"all_special_tokens": ("</s>", "<|im_end|>")})()
    chat.convert_tokens_to_ids = lambda token: {"<|im_end|>": 9}[token]
    assert forward.end_tokens(named, chat) == [2, 7, 9]


def test_an_answer_ends_before_its_end_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = forward.collate([[5, 6, 7], [8, 9, 10, 11]], 0, model.device)
    calls, call = [], model.forward

    def answers(eos: list[int]) -> list[list[int]]:
        cache = forward.prefill(model, batch)
        calls.clear()
        return forward.greedy(model, batch, cache, max_new_tokens=8, pad=0, eos=eos)

    monkeypatch.setattr(model, "forward", lambda *args, **given: calls.append(1) or call(*args, **given))
    free = answers([])
    assert [len(row) for row in free] == [8, 8] and len(calls) == 8
    for stop in ({free[0][3]}, {row[2] for row in free}):
        ends = [next((i for i, token in enumerate(row) if token in stop), 8) for row in free]
        assert answers(sorted(stop)) == [row[:end] for row, end in zip(free, ends, strict=True)]
        assert len(calls) == min(8, max(ends) + 1), "the last row's end token is the last step"


def test_teacher_forcing_in_larger_calls_is_the_same(model: Any) -> None:
    batch = forward.collate([list(range(5, 40)), list(range(50, 70))], 0, model.device)
    golds = [list(range(70, 81)), list(range(90, 94))]
    one, four = (
        forward.teacher_forced(model, batch, forward.prefill(model, batch), golds, pad=0, per_call=n)
        for n in (1, 4)
    )
    assert [len(row) for row in one] == [11, 4]
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_added_methods_are_computed_and_finished_ones_are_not(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(model, tmp_path / "two", methods=["dense"])
    first = (tmp_path / "two" / "samples.jsonl").read_text()
    evaluate(model, tmp_path / "two", methods=["dense", RECYCLED])
    second = (tmp_path / "two" / "samples.jsonl").read_text()
    assert second.startswith(first) and second.count("\n") == 16
    evaluate(model, tmp_path / "one", methods=["dense", RECYCLED])
    assert comparable(read(tmp_path / "two")[1]) == comparable(read(tmp_path / "one")[1])
    monkeypatch.setattr(forward, "prefill", lambda *_: pytest.fail("nothing was left to compute"))
    again = evaluate(model, tmp_path / "two", methods=[RECYCLED])
    assert again.data["rows"] == 16 and len(again.data["methods"]) == 2


def test_bad_input_ends_before_anything_is_written(model: Any, tmp_path: Path) -> None:
    for methods in (["dense", "recycle:k=4"], [], ["recycled:k=0"], ["double_sparsity:k=4"]):
        with pytest.raises(farspan.FarspanError):
            evaluate(model, tmp_path / "none", methods=methods)
    with pytest.raises(farspan.FarspanError, match="batch_size is 0"):
        evaluate(model, tmp_path / "none", batch_size=0)
    assert not (tmp_path / "none").exists()
    evaluate(model, tmp_path, methods=["dense"])
    with pytest.raises(ResultsError, match="seed 1 there, 2 here"):
        evaluate(model, tmp_path, config=CONFIG | {"seed": 2})


def test_ctrl_c_leaves_a_summary_of_what_is_done(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = forward.greedy, [0]

    def greedy(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(forward, "greedy", greedy)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tmp_path, methods=["dense", RECYCLED])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] is False and summary["rows"] == 6
    assert "run the same command to resume" in (tmp_path / "ruler.md").read_text()
    assert model.config._attn_implementation != "farspan"
    monkeypatch.undo()
    assert evaluate(model, tmp_path, methods=["dense", RECYCLED]).data["complete"]


def test_a_session_for_other_methods_does_not_complete_a_folder(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = forward.greedy, [0]

    def greedy(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(forward, "greedy", greedy)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tmp_path, methods=["dense", RECYCLED], batch_size=4)
    monkeypatch.undo()
    quest = tiny.METHODS[2]
    for methods in (["dense"], [quest]):
        found = evaluate(model, tmp_path, methods=methods)
        assert not found.complete and found.data["unfinished"] == [RECYCLED]
        assert json.loads((tmp_path / "summary.json").read_text())["complete"] is False
        assert f"to resume (unfinished: {RECYCLED})." in (tmp_path / "ruler.md").read_text()
    assert evaluate(model, tmp_path, methods=[RECYCLED]).complete
    assert json.loads((tmp_path / "summary.json").read_text())["complete"] is True
    assert "to resume" not in (tmp_path / "ruler.md").read_text()


def test_ctrl_c_while_prompts_are_drawn_asks_for_nothing(model: Any, tmp_path: Path) -> None:
    evaluate(model, tmp_path, methods=["dense"])
    before = {name: (tmp_path / name).read_bytes() for name in ("samples.jsonl", "summary.json", "ruler.md")}

    def drawn() -> Any:
        yield tiny.sample("vt", 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tmp_path, methods=tiny.METHODS, samples=drawn(), config=CONFIG | {"samples": 9})
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    config = read(tmp_path)[0]
    assert (config["methods"], config["samples"], len(config["sessions"])) == (["dense"], 4, 2)
    assert evaluate(model, tmp_path, methods=["dense"]).complete


def test_damaged_rows_and_configs_are_one_sentence(model: Any, tmp_path: Path) -> None:
    evaluate(model, tmp_path, methods=["dense"], samples=tiny.samples(1))
    path, config = tmp_path / "samples.jsonl", tmp_path / "config.json"
    [first, last], settings = path.read_text().splitlines(), config.read_text()
    for name, value, says in (
        ("score", "high", 'score is "high"'),
        ("density", None, "density is null"),
        ("seconds", {"prefill": 1.0}, "decode is null"),
        ("extra", {"depth": "deep"}, 'depth is "deep"'),
        ("steps", 1.5, "steps is 1.5"),
        ("fallbacks", 3, "fallbacks is 3"),
    ):
        path.write_text(f"{json.dumps(json.loads(first) | {name: value})}\n{last}\n")
        with pytest.raises(ResultsError) as caught:
            evaluate(model, tmp_path, methods=["dense"], samples=tiny.samples(1))
        assert f"line 1 of {path} is damaged ({says}); delete that line" in str(caught.value)
    path.write_text(f"{last}\n")  # the line deleted, as told
    assert evaluate(model, tmp_path, methods=["dense"], samples=tiny.samples(1)).complete
    assert comparable(read(tmp_path)[1]) == comparable([json.loads(first), json.loads(last)])
    config.write_text(settings[: len(settings) // 2])
    with pytest.raises(ResultsError, match="is not the config of a farspan evaluation"):
        evaluate(model, tmp_path, methods=["dense"], samples=tiny.samples(1))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_to_the_same_rows(
    model: Any, tmp_path: Path, how: signal.Signals, request: pytest.FixtureRequest
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script: sums in another order are other numbers
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    evaluate(model, tmp_path / "whole", methods=tiny.METHODS[:2], batch_size=2)

    stopped = subprocess.Popen(
        [sys.executable, str(TINY), str(tmp_path / "stopped")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A background job of a plain shell ignores SIGINT, and so would what it starts: undo that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path, deadline = tmp_path / "stopped" / "samples.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert stopped.poll() is None and time.monotonic() < deadline, stopped.communicate()[0].decode()
        time.sleep(0.005)
    stopped.send_signal(how)
    stopped.communicate()
    assert stopped.returncode != 0
    done = read(tmp_path / "stopped")[1]
    assert 2 <= len(done) < 16  # at most the last of the two blocks seen was still being synced
    assert (tmp_path / "stopped" / "summary.json").exists() == (how == signal.SIGINT)
    evaluate(model, tmp_path / "stopped", methods=tiny.METHODS[:2], batch_size=2)
    found = read(tmp_path / "stopped")[1]
    assert found[: len(done)] == done  # nothing finished was computed again
    assert comparable(found) == comparable(read(tmp_path / "whole")[1])


def test_another_calibration_of_any_method_is_told_apart(tmp_path: Path) -> None:
    """The recipe given, a method's own, that of the method underneath, and a file of budgets."""
    a, b, c = (tmp_path / name for name in "abc")
    under, both = f"act:heads=all,over=(sale:recipe={a})", f"sale:recipe={a} + double_sparsity:recipe={b}"
    specs = ["dense", "double_sparsity", f"sale:recipe={a}", both, under, f"act:over=(sale:recipe={a})"]
    specs.append(f"vertical_slash:config={a}")

    def changed(path: Path) -> list[int]:
        for each in (a, b, c):
            each.write_text(each.name)
        before = recipes(specs, c)
        path.write_text("another")
        after = recipes(specs, c)
        assert before.keys() == after.keys() == set(specs[1:])
        return [i for i, spec in enumerate(specs) if before.get(spec) != after.get(spec)]

    assert changed(a) == [2, 3, 4, 5, 6]
    assert changed(b) == [3]
    assert changed(c) == [1, 5], "the one for all that name none of their own"
    assert recipes(["double_sparsity"], a)["double_sparsity"] == hashlib.sha256(b"a").hexdigest()[:16]
