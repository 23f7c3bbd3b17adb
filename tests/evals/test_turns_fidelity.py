"""Turns and fidelity on a tiny model, against a user's own loops: conversations on one cache, and KL by
hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan.evals import fidelity, report
from farspan.evals.folders import read_folders
from farspan.evals.html.others import perplexities
from farspan.evals.perplexity import Perplexity
from farspan.evals.results import read
from farspan.evals.turns import Conversation, Turns

from . import tiny


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model()


def ids_of(text: str, *, first: bool = False) -> list[int]:
    return [tiny.BOS] * first + [ord(letter) % 128 for letter in text]


def test_turns_continue_one_conversation_on_one_cache(model: Any, tmp_path: Path) -> None:
    task = Turns(lengths=[1500], tasks=["kv"], turns=3, samples=2)
    talks: list[Conversation] = list(task.draw(tiny.CharTokenizer()))
    methods = ["dense", tiny.METHODS[3]]
    setup = tiny.setup(model, methods, tmp_path, config=task.config)
    summary = task.run(setup, talks)
    rows = {(row["key"], row["method"]): row for row in read(tmp_path)[1]}
    assert summary.complete and len(rows) == 2 * 3 * 2
    for talk in talks:
        text, before = talk.turns[0].user + talk.turns[0].answer_prefix, 0
        for number, turn in enumerate(talk.turns):
            if number:
                text += f"\n\n{turn.question}{turn.answer_prefix}"
            prompt, gold = ids_of(text, first=True), ids_of(turn.gold)
            row = rows[turn_key(talk, number), "dense"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + gold])).logits[0].log_softmax(-1)
                answer = model.generate(
                    torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                    max_new_tokens=turn.max_new_tokens, do_sample=False,
                )[0, len(prompt) :]  # fmt: skip
            nll = -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(gold))
            assert row["nll_sum"] == pytest.approx(nll, abs=1e-3)
            kept = [token for token in answer.tolist() if token != tiny.EOS]
            assert row["answer"] == tiny.CharTokenizer().decode(kept)
            assert row["prompt_tokens"] == len(prompt)
            assert row["reused_tokens"] == (before and before - 1), "all but the token that is fed next"
            text += turn.gold
            before = len(prompt + gold)
        assert len(ids_of(text, first=True)) + 64 <= 1500 + len(talk.turns[-1].gold)
    window = [rows[turn_key(talks[0], n), methods[1]] for n in range(3)]
    assert all(row["density"]["decode"] < 0.2 for row in window) and window[1]["density"]["prefill"] < 0.2
    [overall] = [row for row in summary.data["overall"] if row["method"] == methods[1]]
    assert overall["n"] == 6 and overall["nll_diff"]["n"] == 2, "turns of a conversation are not independent"
    losses = [rows[k, methods[1]]["nll"] - rows[k, "dense"]["nll"] for talk in talks for k in talk.keys]
    assert overall["nll_diff"]["mean"] == pytest.approx(sum(losses) / 6)
    table = report.terminal_table(summary.data).text(120)
    assert "1500 kv_1" in table and "1500 kv_3" in table
    page = (tmp_path / "turns.md").read_text()
    assert "one conversation on one cache" in page
    counts = [rows[talk.keys[n], "dense"]["reused_tokens"] for talk in talks for n in (1, 2)]
    assert f"has reused {sum(counts) / 4:.0f} tokens on average" in page


def turn_key(talk: Conversation, number: int) -> str:
    return talk.keys[number]


@pytest.mark.parametrize("spec", ["h2o:k=64", "h2o:k=64,evict=true", "snapkv:k=64,window=8,evict=true"])
def test_a_methods_state_goes_on_over_the_turns_as_in_a_users_own_loop(
    model: Any, spec: str, tmp_path: Path
) -> None:
    task = Turns(lengths=[900], tasks=["kv"], turns=2, samples=1)
    [talk] = task.draw(tiny.CharTokenizer())
    task.run(tiny.setup(model, ["dense", spec], tmp_path, config=task.config), [talk])
    rows = {(row["key"], row["method"]): row for row in read(tmp_path)[1]}
    first, second = talk.turns
    prompt, gold = ids_of(first.user + first.answer_prefix, first=True), ids_of(first.gold)
    later = ids_of(f"\n\n{second.question}{second.answer_prefix}")
    nlls = []
    with farspan.patch(model, spec), torch.no_grad():
        cache = model(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        for fed, target in (([prompt[-1], *gold[:-1]], gold), (later[-1:], ids_of(second.gold))):
            if fed == later[-1:]:
                model(torch.tensor([[gold[-1], *later[:-1]]]), past_key_values=cache)
                fed = [*fed, *target[:-1]]
            total = 0.0
            for token, wanted in zip(fed, target, strict=True):
                logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
                total -= float(logits.log_softmax(-1)[wanted])
            nlls.append(total)
    for number, nll in enumerate(nlls):
        assert rows[talk.keys[number], spec]["nll_sum"] == pytest.approx(nll, abs=1e-3)
        dense = rows[talk.keys[number], "dense"]["nll_sum"]
        assert abs(rows[talk.keys[number], spec]["nll_sum"] - dense) > 1e-3, "it does evict"


def test_fidelity_is_the_divergence_from_dense_along_denses_answer(model: Any, tmp_path: Path) -> None:
    texts = ["the grass is green. " * 6 + "And the sky?", "the sun is yellow. " * 4 + "And now"]
    suite = fidelity.Fidelity(prompts=texts, new_tokens=10)
    prompts = list(suite.draw(tiny.CharTokenizer()))
    assert [prompt.length for prompt in prompts] == [256, 128]
    methods = ["dense", tiny.METHODS[3], tiny.METHODS[2]]
    setup = tiny.setup(model, methods, tmp_path, config=suite.config)
    summary = tiny.evaluated(suite, setup)
    rows = {(row["index"], row["method"]): row for row in read(tmp_path)[1]}
    assert len(rows) == 6
    for prompt in prompts:
        dense = rows[prompt.index, "dense"]
        assert dense["kl"] == dense["kl_most"] == 0 and dense["score"] == 1 and dense["first_other"] is None
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            limits: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "eos_token_id": None}
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
            base = model(whole).logits[0, ids.shape[1] - 1 : -1].double().log_softmax(-1)
            for spec in methods[1:]:
                with farspan.patch(model, spec):
                    cache = model(whole[:, : ids.shape[1] - 1], use_cache=True).past_key_values
                    steps = range(ids.shape[1] - 1, whole.shape[1] - 1)
                    mine = torch.stack(
                        [model(whole[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in steps]
                    )
                mine = mine.double().log_softmax(-1)
                kl = (base.exp() * (base - mine)).sum(-1)
                same = base.argmax(-1) == mine.argmax(-1)
                row = rows[prompt.index, spec]
                assert row["kl"] == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-5)
                assert row["kl_most"] == pytest.approx(float(kl.max()), rel=1e-3, abs=1e-5)
                assert row["score"] == float(same.double().mean()) and row["kl"] > 1e-4
                assert row["first_other"] == next((i for i, x in enumerate(same.tolist()) if not x), None)
    line = next(r for r in summary.data["methods"] if r["method"] == methods[1])
    found = [rows[i, methods[1]] for i in (0, 1)]
    assert line["kl"] == pytest.approx(sum(r["kl"] for r in found) / 2)
    assert line["kl_most"] == max(r["kl_most"] for r in found)
    text = (tmp_path / "fidelity.md").read_text()
    assert "| method | n | same top token (95 %) | mean KL | largest KL |" in text
    assert tiny.evaluated(suite, setup).data["rows"] == 6


def test_prompts_are_read_from_text_lines_and_folders(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("First.\nStill first.")
    (tmp_path / "two.jsonl").write_text('"Second."\n\n{"prompt": "Third.", "id": 3}\n')
    assert fidelity.read_prompts([tmp_path]) == ["First.\nStill first."]
    assert fidelity.read_prompts([tmp_path / "two.jsonl", tmp_path / "one.txt"])[:2] == ["Second.", "Third."]
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}')
    for path, sentence in (
        (
            tmp_path / "bad.jsonl",
            r'line 1 of .*bad\.jsonl is neither a JSON string nor an object with a "prompt"',
        ),
        (tmp_path / "none.txt", "cannot be read"),
    ):
        with pytest.raises(farspan.FarspanError, match=sentence):
            fidelity.read_prompts([path])
    (tmp_path / "one.txt").write_text(" ")
    with pytest.raises(farspan.FarspanError, match="there is no prompt in"):
        fidelity.read_prompts([tmp_path / "one.txt"])


def test_perplexity_by_position_of_sliding_windows(model: Any, tmp_path: Path) -> None:
    text = "".join(f"line {n} of a text that goes on. " for n in range(40))
    methods = ["dense", tiny.METHODS[3]]
    how: dict[str, Any] = {"lengths": [96], "new_tokens": 40, "samples": 3}
    suite = Perplexity(text=tiny.prose(text), sliding=True, **how)
    data = tiny.evaluated(suite, tiny.setup(model, methods, tmp_path, config=suite.config)).data
    ids = ids_of(text, first=True)
    rows = {(row["index"], row["method"]): row for row in read(tmp_path)[1]}
    for index in range(3):
        row = rows[index, "dense"]
        window = torch.tensor([ids[40 * index : 40 * index + 96]])
        with torch.no_grad():
            logits = model(window).logits[0].log_softmax(-1)
        nll = [-float(logits[i - 1, window[0, i]]) for i in range(56, 96)]
        assert row["recipe"] == {"window": index, "begin": 40 * index}
        assert [first for first, _ in row["by_position"]] == [56 + 5 * part for part in range(8)]
        for part, (_, found) in enumerate(row["by_position"]):
            assert found == pytest.approx(sum(nll[5 * part : 5 * part + 5]) / 5, abs=2e-4)
    [_, line] = data["overall"]
    for part, found in enumerate(line["by_position"]):
        mine, base = ([rows[i, m]["by_position"][part][1] for i in range(3)] for m in (methods[1], "dense"))
        assert found["perplexity"] == pytest.approx(math.exp(sum(mine) / 3))
        assert found["nll_diff"]["mean"] == pytest.approx((sum(mine) - sum(base)) / 3)
    assert "## By position in 96" in (tmp_path / "ppl.md").read_text()
    _, grid = perplexities(read_folders([tmp_path]))
    assert grid.columns == ["from position", "dense perplexity", f"{methods[1]} ΔNLL"] and len(grid.rows) == 8
    with pytest.raises(farspan.FarspanError, match="another configuration"):
        suite = Perplexity(text=tiny.prose(text), **how)
        tiny.evaluated(suite, tiny.setup(model, methods, tmp_path, config=suite.config))
