"""lm-eval on the patched model: a task of two local files, prompts that are too long, and what was read."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from farspan import FarspanError
from farspan.evals import harness
from farspan.evals.results import read

from . import tiny

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the optional extra lm-eval is not installed"
)
WINDOW = "window:w=16,sinks=2"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of log-likelihoods and one that generates, each of a YAML and a JSON file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"{'the grass is green. ' * (1 + n % 3)}Is {n} even?",
            "answers": ["yes", "no"],
            "right": n % 2,
        }
        for n in range(8)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = 'doc_to_choice: "{{answers}}"'
    choice = TASK.format(
        name="even", data=data, kind="multiple_choice", target="right", more=more, metric="acc"
    )
    limits = "generation_kwargs: {max_gen_toks: 8, until: []}"
    answer = TASK.format(
        name="say", data=data, kind="generate_until", target='"yes"', more=limits, metric="exact_match"
    )
    (folder / "even.yaml").write_text(choice)
    (folder / "say.yaml").write_text(answer)
    return folder


@pytest.fixture
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Leaves lm-eval's own tasks out, whose thousands of files take many seconds to read."""
    from lm_eval.tasks import TaskManager

    def manager(include: Any) -> Any:
        return TaskManager(include_path=str(include), include_defaults=False)

    monkeypatch.setattr(harness, "_manager", manager)
    return manager


@pytest.fixture
def model(smollm2_tokenizer: Any, tiny_llama: Any) -> Any:
    return tiny_llama(vocab_size=49152, seed=0, max_position_embeddings=128)


def setup(model: Any, tokenizer: Any, out: Path, **changes: Any) -> Any:
    return tiny.setup(model, ["dense", WINDOW], out, tokenizer=tokenizer, **changes)


@needs_lm_eval
def test_scores_are_the_harnesss_and_what_was_read_stands_beside_them(
    model: Any, smollm2_tokenizer: Any, folder: Path, tmp_path: Path, own_tasks: Any
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    given = setup(model, smollm2_tokenizer, tmp_path)
    summary = harness.harness(given, ["even", "say"], include=folder, limit=6, batch_size=2)
    rows = {(row["task"], row["method"]): row for row in read(tmp_path)[1]}
    assert summary.complete and len(rows) == 4
    plain = HFLM(pretrained=model, tokenizer=smollm2_tokenizer, batch_size=2)
    expected = simple_evaluate(plain, tasks=["even", "say"], task_manager=own_tasks(folder), limit=6)
    for task, metric in (("even", "acc"), ("say", "exact_match")):
        found = rows[task, "dense"]["metrics"][task]
        assert found[f"{metric},none"] == expected["results"][task][f"{metric},none"]
        assert len(rows[task, "dense"]["scores"]) == 6 and rows[task, "dense"]["prompts_cut"] == 0
    assert rows["even", "dense"]["density"] == {"prefill": 1.0, "decode": None}
    assert rows["even", WINDOW]["density"]["prefill"] < 1
    assert rows["say", WINDOW]["density"]["decode"] < 1
    text = (tmp_path / "lm-eval.md").read_text()
    assert f"| even | acc | {WINDOW} | 6 |" in text and "| say | exact_match | dense | 6 |" in text
    before = (tmp_path / "samples.jsonl").read_text()
    harness.harness(given, ["even", "say"], include=folder, limit=6)
    assert (tmp_path / "samples.jsonl").read_text() == before, "nothing is done again"


@needs_lm_eval
def test_a_prompt_longer_than_the_positions_is_refused_or_cut_in_the_middle(
    smollm2_tokenizer: Any, tiny_llama: Any, folder: Path, tmp_path: Path, own_tasks: Any
) -> None:
    short = tiny_llama(vocab_size=49152, seed=0, max_position_embeddings=16)
    for task in ("even", "say"):
        with pytest.raises(
            FarspanError, match=r"a prompt has \d+ tokens, and the model has room for .* --truncate"
        ):
            harness.harness(setup(short, smollm2_tokenizer, tmp_path / "no"), [task], include=folder, limit=4)
        out = tmp_path / task
        given = setup(short, smollm2_tokenizer, out)
        harness.harness(given, [task], include=folder, limit=4, truncate="middle")
        for row in read(out)[1]:
            assert row["prompts_cut"] > 0 and row["longest_prompt"] > 16
        assert f" {row['prompts_cut']} |" in (out / "lm-eval.md").read_text()


@needs_lm_eval
def test_unknown_tasks_and_folders_are_one_sentence(
    model: Any, smollm2_tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    given = setup(model, smollm2_tokenizer, tmp_path / "none")
    with pytest.raises(FarspanError, match="lm-eval has no task 'evne'"):
        harness.harness(given, ["evne"], include=folder)
    with pytest.raises(FarspanError, match="is not a folder"):
        harness.harness(given, ["even"], include=tmp_path / "nowhere")
    with pytest.raises(FarspanError, match=r"--truncate is 'middle' or left out; got 'left'"):
        harness.harness(given, ["even"], include=folder, truncate="left")
    assert not (tmp_path / "none").exists()


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FarspanError, match=r"pip install 'farspan\[lm-eval\]'"):
        harness.check(["even"], None)


@pytest.mark.parametrize(("most", "kept"), [(4, [0, 1, 8, 9]), (5, [0, 1, 7, 8, 9]), (10, list(range(10)))])
def test_the_middle_is_cut_out(most: int, kept: list[int]) -> None:
    assert harness.cut_middle(range(10), most) == kept
    lengths = harness.Lengths(8, "middle")
    assert lengths.fitted(range(10), most) == kept and lengths.cut == (most < 10) and lengths.longest == 10


def test_a_row_has_what_was_read_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for lm-eval that calls the model once, so that this is tested where it is missing."""
    model = tiny.tiny_model()

    def simple_evaluate(wrapped: Any, **how: Any) -> dict[str, Any]:
        cache = model(torch.arange(40)[None], use_cache=True).past_key_values
        model(torch.tensor([[1]]), past_key_values=cache)
        rows = [{"doc_id": 0, "metrics": ["acc"], "acc": 1.0}]
        return {"results": {"even": {"acc,none": 1.0}}, "samples": {"even": rows}}

    manager = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(all_tasks=["even"]))
    stand_in = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.tasks": manager,
        "lm_eval.models": SimpleNamespace(),
        "lm_eval.models.huggingface": SimpleNamespace(
            HFLM=type("HFLM", (), {"__init__": lambda *_, **__: None})
        ),
    }
    for name, module in stand_in.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "check", lambda tasks, truncate: None)
    monkeypatch.setattr(harness, "_version", lambda: "0")
    summary = harness.harness(tiny.setup(model, ["dense", WINDOW], tmp_path), ["even"])
    _, rows = read(tmp_path)
    density = {row["method"]: row["density"]["decode"] for row in rows}
    assert summary.complete and density == {"dense": 1, WINDOW: pytest.approx(16 / 41, abs=0.1)}
