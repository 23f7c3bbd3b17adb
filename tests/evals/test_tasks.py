"""The tasks that are classes: what their prompts hold, their sizes, and a task of a user's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from farspan import FarspanError
from farspan.evals import needle, retrieval
from farspan.evals.needle import Needle
from farspan.evals.results import read
from farspan.evals.retrieval import Retrieval
from farspan.evals.run import run
from farspan.evals.sample import Sample, encode, score
from farspan.evals.task import Task, filled
from farspan.evals.tokens import Filling
from farspan.evals.turns import Turns
from farspan.runtime.models import turn_ids

from . import tiny
from .ruler_tools import Words

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
FACT = re.compile(r"The special magic ([A-Z][A-Za-z ]+) number is: (\d{7})\.")


def drawn(task: Task, tokenizer: Any = None) -> list[Any]:
    return list(task.draw(tokenizer or Words()))


def test_a_passkey_stands_once_in_the_noise_and_anywhere() -> None:
    depths = []
    for sample in drawn(Retrieval(lengths=[600], tasks=["passkey"], samples=30)):
        [(key, again)] = re.findall(r"The pass key is (\d{5})\. Remember it\. (\d{5}) is", sample.context)
        assert key == again and sample.references == (key,) and sample.context.count(key) == 2
        lines = sample.context.removeprefix(retrieval.PASSKEY.partition("{")[0]).rstrip().split("\n")
        assert lines.count(retrieval.NOISE) == sample.recipe["units"] == len(lines) - 1
        [place] = [i for i, line in enumerate(lines) if key in line]
        depths.append(place / sample.recipe["units"])
        assert sample.extra["true_depths"] == [depths[-1]]
        assert (sample.question, sample.answer_prefix) == ("What is the pass key?", "The pass key is")
        assert score(sample, sample.gold) == 1
    assert min(depths) < 0.15 and max(depths) > 0.85


def test_kv_is_a_json_object_with_the_value_of_the_key_that_is_asked_for() -> None:
    places = []
    for sample in drawn(Retrieval(lengths=[400], tasks=["kv"], samples=30)):
        text = sample.context.removeprefix(retrieval.KV.partition("{")[0])
        pairs = json.loads(text)
        [key] = re.findall(rf'^Key: "({UUID})"$', sample.question)
        assert sample.references == (pairs[key],) and len(pairs) == sample.recipe["units"]
        assert len({*pairs, *pairs.values()}) == 2 * len(pairs), "no uuid comes twice"
        places.append(list(pairs).index(key) / (len(pairs) - 1))
        assert sample.extra["true_depths"] == [places[-1]]
    assert min(places) < 0.15 and max(places) > 0.85


def test_needles_of_each_kind() -> None:
    task = Needle(lengths=[600], tasks=needle.TASKS, samples=6, depths=[0, 0.5, 1.0])
    for sample in drawn(task):
        facts = FACT.findall(sample.context)
        kept = sample.extra["depth"]
        assert abs(sample.extra["true_depth"] - kept) < 0.1
        if sample.task == "needle":
            assert len(facts) == 1
        elif sample.task == "multi_key":
            assert len(dict(facts)) == 4
            city = re.findall(r"special magic (.+) number mentioned", sample.question)[0]
            assert sample.references == (dict(facts)[city],)
        elif sample.task == "multi_value":
            assert len({city for city, _ in facts}) == 1
            assert sorted(number for _, number in facts) == sorted(sample.references)
            assert all(number in sample.gold for number in sample.references)
        else:
            after = dict(re.findall(rf"The key that follows ({UUID}) is ({UUID})\.", sample.context))
            [key] = re.findall(UUID, sample.question)
            hops = 0
            while key in after:
                key, hops = after[key], hops + 1
            assert hops == len(after) == 4 and sample.references == (key,)
        assert score(sample, sample.gold) == 1 and score(sample, "") == 0
    assert len({tuple(s.references) for s in drawn(task)}) == 4 * 3 * 6


@pytest.mark.parametrize(
    "task",
    [
        Retrieval(lengths=[700], samples=2),
        Needle(lengths=[700], tasks=needle.TASKS, samples=1, depths=[0.3]),
    ],
)
def test_prompts_fill_their_length_and_depend_on_their_coordinates_alone(
    smollm2_tokenizer: Any, task: Task
) -> None:
    every = drawn(task, smollm2_tokenizer)
    unit = 120  # the longest of them, a pair of uuids
    for sample in every:
        tokens = len(encode(smollm2_tokenizer, sample))
        assert tokens == sample.recipe["prompt_tokens"] and 700 - unit < tokens + sample.max_new_tokens <= 700
    assert drawn(replace(task, samples=1), smollm2_tokenizer)[0] == every[0]
    assert drawn(replace(task, seed=2), smollm2_tokenizer)[0].references != every[0].references


def test_turns_ask_one_context_for_different_things(smollm2_tokenizer: Any) -> None:
    task = Turns(lengths=[1200], turns=4, samples=2)
    for talk in drawn(task, smollm2_tokenizer):
        first, *others = talk.turns
        assert [turn.task for turn in talk.turns] == [f"{talk.task}_{n}" for n in (1, 2, 3, 4)]
        assert talk.keys == [f"turns/{talk.task}_{n}/1200/{first.index}" for n in (1, 2, 3, 4)]
        assert all(turn.context == "" for turn in others)
        answers = [turn.references[0] for turn in talk.turns]
        assert len(set(answers)) == 4 and all(first.context.count(answer) == 1 for answer in answers)
        if talk.task == "kv":
            pairs = json.loads(first.context.partition("\n\n")[2])
            asked = [re.findall(UUID, turn.question)[0] for turn in talk.turns]
            assert [pairs[key] for key in asked] == answers and len(pairs) == talk.recipe["units"]
        else:
            facts = dict(FACT.findall(first.context))
            asked = [re.findall(r"magic (.+) number", turn.question)[0] for turn in talk.turns]
            assert [facts[city] for city in asked] == answers and len(facts) == 4
        whole = len(encode(smollm2_tokenizer, first)) + first.max_new_tokens
        for before, turn in zip(talk.turns, others, strict=False):
            whole += len(smollm2_tokenizer(before.gold).input_ids)
            whole += len(turn_ids(smollm2_tokenizer, turn.question, turn.answer_prefix))
        assert 1200 - 130 < whole <= 1200
    assert task.config["tasks"] == [f"{name}_{n}" for name in ("kv", "needle") for n in (1, 2, 3, 4)]


def test_a_further_turn_is_what_the_chat_format_writes(smollm2_tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "A B"},
        {"role": "user", "content": "Two?"},
    ]
    whole = smollm2_tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    before = smollm2_tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, tokenize=False)
    pieces = [smollm2_tokenizer(text, add_special_tokens=False).input_ids for text in (before, "A B")]
    ids = [*pieces[0], *pieces[1], *turn_ids(smollm2_tokenizer, "Two?", "It is")]
    assert smollm2_tokenizer.decode(ids) == f"{whole}It is"
    assert turn_ids(Words(), "Two?", " It") == ["Two?", "It"], "no chat format: a blank line between"


def test_wrong_tasks_are_one_sentence() -> None:
    for make, sentence in (
        (
            lambda: Retrieval(lengths=[100], tasks=["pass"]),
            "no retrieval task 'pass'; the tasks are passkey, kv",
        ),
        (lambda: Retrieval(lengths=[]), "retrieval was given no length"),
        (lambda: Turns(lengths=[100], turns=0), "turns is 0; give 1 to"),
        (lambda: Needle(lengths=[100], depths=[2]), "depth 2 is not a share"),
        (lambda: Retrieval(lengths=[100], samples=0), "count 0 is not"),
    ):
        with pytest.raises(FarspanError, match=sentence):
            make()
    with pytest.raises(FarspanError, match="retrieval task passkey needs a length of at least"):
        Retrieval(lengths=[60]).check(Words())


@dataclass(frozen=True, kw_only=True)
class Greens(Task):
    """A user's own: how many letters of the answer are a "g"."""

    suite: ClassVar[str] = "greens"

    def make(self, tokenizer: Any, name: str, length: int, count: int) -> Iterator[Sample]:
        filling = Filling(tokenizer)
        for index in range(count):
            sample = replace(tiny.sample(name, index, length=length), suite=self.suite)

            def draft(units: int, sample: Sample = sample) -> Sample:
                return replace(sample, context="the grass is green. " * units)

            yield filled(filling, draft, what=name)

    def score(self, sample: Sample, answer: str) -> float:
        return answer.count("g") / max(len(answer), 1)


def test_a_task_of_ones_own_is_run_resumed_and_shown(tmp_path: Path) -> None:
    task = Greens(lengths=[128, 200], samples=2)
    setup = tiny.setup(tiny.tiny_model(), tiny.METHODS[:2], tmp_path, config=task.config)
    summary = run(setup, task.draw(setup.tokenizer), score=task.score)
    rows = read(tmp_path)[1]
    assert summary.complete and summary.data["suite"] == "greens" and len(rows) == 8
    assert all(row["score"] == row["answer"].count("g") / max(len(row["answer"]), 1) for row in rows)
    assert "greens.md" in summary.files and "| `dense` |" in (tmp_path / "greens.md").read_text()
    lines = (tmp_path / "samples.jsonl").read_text()
    run(setup, task.draw(setup.tokenizer), score=task.score)
    assert (tmp_path / "samples.jsonl").read_text() == lines
