"""ListOps: expressions against an evaluation of their text, their limits, and the training loop of MQAR."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan import FarspanError
from farspan.attention.hybrid import encoder_mixers
from farspan.evals.mqar.data import Examples
from farspan.evals.mqar.listops import TOKENS, VOCABULARY, ListOps, evaluate
from farspan.evals.mqar.model import Model
from farspan.evals.mqar.settings import parse_setting

SMALL = ListOps(shortest=6, longest=30, depth=4, arguments=5)
BY_NAME: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def value(words: list[str]) -> tuple[int, list[str], int, int]:
    """(value, words left, levels, most arguments) of the expression at the start, by recursion over its
    text."""
    head, *rest = words
    if head not in BY_NAME:
        return int(head), rest, 1, 0
    values, levels, most = [], 0, 0
    while rest[0] != "]":
        found, rest, deep, many = value(rest)
        values.append(found)
        levels, most = max(levels, deep), max(most, many)
    assert len(values) >= 2
    return BY_NAME[head](values), rest[1:], levels + 1, max(most, len(values))


def test_examples_are_expressions_within_the_limits_and_their_values() -> None:
    examples = SMALL.draw(300, vocabulary=VOCABULARY, filler="zero", seed=1)
    levels, arguments, operators, lengths = set(), set(), set(), set()
    for tokens, place, answer in zip(examples.tokens, examples.places, examples.answers, strict=True):
        words = [TOKENS[token] for token in tokens.tolist()]
        assert words[place] == "=" and not any(words[place + 1 :]), "padding stands behind the question"
        found, left, deep, many = value(words[:place])
        assert left == [] and TOKENS[answer] == str(found)
        levels.add(deep)
        arguments.add(many)
        operators |= set(words) & set(BY_NAME)
        lengths.add(int(place))
    assert max(levels) == 4 and max(arguments) == 5 and operators == set(BY_NAME)
    assert 6 <= min(lengths) < 10 and 25 < max(lengths) <= 30
    counts = torch.bincount(examples.answers.flatten(), minlength=11)[1:11]
    assert (counts > 0).all() and counts.max() < 120, "every digit is an answer, none of them half the time"


@pytest.mark.parametrize("spec", sorted(encoder_mixers()))
def test_encoder_mixers_see_no_padding(spec: str) -> None:
    """An expression in a longer batch is answered as alone; the encoder reads all of it."""
    torch.manual_seed(0)
    spec = "hydra:head_dim=8" if spec == "hydra" else spec
    sizes: dict[str, Any] = {"dim": 8, "heads": 2, "length": SMALL.length, "vocabulary": VOCABULARY}
    model = Model(spec, **sizes, encoders=True).double()
    assert model.positions is not None
    examples = SMALL.draw(6, vocabulary=VOCABULARY, filler="zero", seed=1)
    lengths = examples.lengths
    assert lengths is not None and len(lengths.unique()) > 1 and examples.real is not None
    assert bool(((examples.tokens != 0) == examples.real).all())
    out = model(examples)
    for row in range(6):
        alone = examples[row : row + 1]
        alone = Examples(alone.tokens[:, : int(lengths[row])], alone.places, alone.answers)
        assert torch.allclose(model(alone), out[row], atol=1e-10)
    with pytest.raises(FarspanError, match=f"{spec.partition(':')[0]} reads later tokens"):
        Model(spec, **sizes)


def test_draws_depend_on_the_seed_alone() -> None:
    how: dict[str, Any] = {"vocabulary": VOCABULARY, "filler": "zero"}
    first = SMALL.draw(20, seed=5, **how)
    assert torch.equal(first.tokens, SMALL.draw(20, seed=5, **how).tokens)
    assert torch.equal(first.tokens[:10], SMALL.draw(10, seed=5, **how).tokens)
    assert not torch.equal(first.tokens, SMALL.draw(20, seed=6, **how).tokens)


def test_the_examples_of_the_docstring() -> None:
    def of(text: str) -> int:
        return evaluate([TOKENS.index(word) for word in text.split()])

    assert of("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9
    assert of("[SM 5 6 7 ]") == 8 and of("[MED 1 4 6 9 ]") == 5 and of("[MED 8 2 3 ]") == 3


def test_settings_are_read_and_refused_in_a_sentence() -> None:
    assert str(parse_setting("500-2000x10x10")) == "500-2000x10x10" and parse_setting("6-30x4x5") == SMALL
    assert parse_setting("64x4").suite == "mqar" and SMALL.suite == "listops" and SMALL.length == 31
    for text, sentence in (
        ("6-30x4", "SHORTEST-LONGESTxDEPTHxARGUMENTS such as"),
        ("40-30x4x5", "allows no expression"),
        ("6-30x1x5", "allows no expression"),
    ):
        with pytest.raises(FarspanError, match=sentence):
            parse_setting(text)
    with pytest.raises(FarspanError, match="none fits the setting 60-64x2x3"):
        parse_setting("60-64x2x3").draw(1, vocabulary=VOCABULARY, filler="zero", seed=1)


def test_the_command_trains_resumes_and_shows_a_table(
    farspan_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = (
        "--settings 4-8x2x3 --mixers attention --dim 16 --samples 64 --test-samples 32 --epochs 2 --lr 1e-2"
    )
    code, out, err = farspan_command("eval", "listops", *asked.split(), columns=120)
    assert code == 0 and "listops · accuracy in percent" in out and "4-8x2x3" in out, err
    folder = tmp_path / "out" / "listops"
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and 0 <= rows[0]["accuracy"]["4-8x2x3"] <= 1
    assert "# ListOps: accuracy in percent" in (folder / "listops.md").read_text()
    assert (folder / "listops.png").stat().st_size > 1000
    code, _, err = farspan_command("eval", "listops", *asked.split(), columns=120)
    assert code == 0 and len((folder / "samples.jsonl").read_text().splitlines()) == 1, err
    for suite, setting, says in (
        ("listops", "64x4", "SHORTEST-LONGESTxDEPTHxARGUMENTS such as 16-64x4x5; got '64x4'"),
        ("mqar", "4-8x2x3", "LENGTHxPAIRS such as 64x4; got '4-8x2x3'"),
    ):
        code, _, err = farspan_command("eval", suite, "--settings", setting, columns=120)
        assert code == 2 and says in err
