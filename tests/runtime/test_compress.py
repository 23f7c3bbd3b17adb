"""Shorter prompts: passages, their scores against the attention that the model returns, and what is kept."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import farspan
from farspan import FarspanError, Unsupported
from farspan.runtime.compress.by_attention import AttentionScorer, even_pieces
from farspan.runtime.compress.passages import cut_passages, first_part, last_part
from farspan.runtime.compress.prompt import Compressed, compress
from farspan.runtime.models import plain_ids

from .small_models import make, snapshot

FACTS = [f"The {what} of {who} is kept in the {where}." for what, who, where in (
    ("red lamp", "Anna", "cellar"), ("old clock", "Bruno", "attic"), ("green coat", "Clara", "hall"),
    ("brass key", "David", "kitchen"), ("blue vase", "Emma", "garden"), ("long rope", "Felix", "barn"),
    ("white chair", "Greta", "chapel"), ("iron box", "Hugo", "tower"), ("small drum", "Ida", "library"),
    ("glass bowl", "Jonas", "stable"), ("paper kite", "Klara", "office"), ("silver spoon", "Leo", "bakery"),
)]  # fmt: skip
HEAD = "Read these notes.\n\n"
QUESTION = "Where is the brass key of David kept?"
PROMPT = HEAD + "\n\n".join(FACTS) + "\n\n" + QUESTION


def words(texts: list[str]) -> list[int]:
    """A count of tokens: words and marks."""
    return [len(text.split()) for text in texts]


class OfCharacters:
    """A tokenizer of one token a character."""

    bos_token_id = eos_token_id = chat_template = None

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[3 + ord(c) % 125 for c in text])

    def get_vocab(self) -> dict[str, int]:
        return {chr(c): c for c in range(125)}


LONG = (
    "One two three. Four five six! Dr. Seven eight nine ten? Eleven twelve.\n\nShort.\n\n"
    "def f(x):\n    return x\n\ndef g(x, y):\n    a = x + y\n    b = a * 2 - x\n    return a, b, x, y\n\n"
    "- first item of a list\n- second item of a list\n- third item\n\n" + 30 * "word " + "\n"
)


def test_passages_are_the_text_and_keep_sentences_and_lines_whole() -> None:
    found = cut_passages(LONG, 8, words)
    assert "".join(found) == LONG
    assert max(words(found)) <= 8
    assert found[:3] == [
        "One two three. Four five six! ",
        "Dr. Seven eight nine ten? Eleven twelve.\n\n",
        "Short.\n\n",
    ]
    assert "def f(x):\n    return x\n\n" in found
    assert "    a = x + y\n" not in found  # lines are cut behind their ends, and packed
    assert all(passage[-1].isspace() for passage in found)
    assert [len(passage.split()) for passage in found[-4:]] == [8, 8, 8, 6]
    assert "".join(cut_passages("x" * 40, 8, lambda texts: [len(text) for text in texts])) == "x" * 40
    assert cut_passages("一二三。四五六。七八九。", 5, lambda texts: list(map(len, texts))) == [
        "一二三。", "四五六。", "七八九。"
    ]  # fmt: skip


def test_head_and_question_are_paragraphs_or_sentences() -> None:
    assert first_part(PROMPT, 64, words) == HEAD
    assert last_part(PROMPT, 64, words) == QUESTION
    flat = " ".join(FACTS) + " " + QUESTION
    assert first_part(flat, 64, words) == FACTS[0] + " "
    assert last_part(flat, 64, words) == QUESTION
    assert last_part(30 * "word ", 8, words) == 6 * "word "


def test_pieces_are_few_and_even() -> None:
    for sizes in ([5, 5, 5, 5, 5, 5, 5], [1, 9, 1, 1, 9, 2, 3], [4]):
        pieces = even_pieces(sizes, 12)
        assert [i for piece in pieces for i in piece] == list(range(len(sizes)))
        totals = [sum(sizes[i] for i in piece) for piece in pieces]
        assert max(totals) <= 12
        best = min(  # by brute force over all cuts into as few pieces
            max(sum(sizes[a:b]) for a, b in zip((0, *cuts), (*cuts, len(sizes)), strict=True))
            for count in [
                next(n for n in range(len(sizes)) if any(fits(sizes, c) for c in chosen(len(sizes), n)))
            ]
            for cuts in chosen(len(sizes), count)
        )
        assert max(totals) == best


def chosen(size: int, count: int) -> list[tuple[int, ...]]:
    return list(combinations(range(1, size), count))


def fits(sizes: list[int], cuts: tuple[int, ...]) -> bool:
    return all(sum(sizes[a:b]) <= 12 for a, b in zip((0, *cuts), (*cuts, len(sizes)), strict=True))


def naive_scores(
    model: Any, layers: list[int], opening: list[int], passages: list[list[int]], query: list[int]
) -> list[float]:
    """The mean attention from a token of the query to one of a passage, by the model's own weights."""
    gap = plain_ids(OfCharacters(), "\n\n")
    ids = [*opening, *(token for passage in passages for token in passage), *gap, *query]
    weights = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    rows = torch.stack([weights[i][0].double() for i in layers]).mean((0, 1))[-len(query) :].mean(0)
    scores, at = [], len(opening)
    for passage in passages:
        scores.append(rows[at : at + len(passage)].mean().item())
        at += len(passage)
    return scores


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_scores_are_the_models_own_attention(name: str) -> None:
    model = make(name)
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(3, 128, (n,), generator=generator).tolist()  # noqa: E731
    opening, query, passages = draw(3), draw(5), [draw(n) for n in (7, 1, 12, 9, 4)]
    scorer = AttentionScorer(model, OfCharacters(), piece=500)
    before = snapshot(model)
    found = scorer(opening, passages, query)
    assert snapshot(model) == before
    assert found.read == 3 + 33 + 2 + 5
    model.set_attn_implementation("eager")
    wanted = naive_scores(model, scorer.layers, opening, passages, query)
    assert found.scores == pytest.approx(wanted, rel=1e-4)


def test_a_long_text_is_read_in_pieces() -> None:
    model = make("llama")
    passages = [[3 + (5 * i + j) % 100 for j in range(9)] for i in range(7)]
    whole = AttentionScorer(model, OfCharacters(), piece=30)
    parts = [whole([4, 5], passages[a:b], [6, 7]) for a, b in ((0, 2), (2, 4), (4, 6), (6, 7))]
    found = whole([4, 5], passages, [6, 7])
    assert found.scores == pytest.approx([x for part in parts for x in part.scores])
    assert found.read == sum(part.read for part in parts) == 7 * 9 + 4 * 6
    with pytest.raises(FarspanError, match="do not fit into a piece of 14"):
        AttentionScorer(model, OfCharacters(), piece=14)([4, 5], passages, [6, 7])


def check(found: Compressed, tokenizer: Any, keep: float) -> None:
    """What is true of every result."""
    assert "".join(passage.text for passage in found.passages) == PROMPT
    assert found.tokens_before == len(plain_ids(tokenizer, PROMPT))
    assert found.tokens_after == len(plain_ids(tokenizer, found.prompt)) <= keep * found.tokens_before
    kept = [passage.text.strip() for passage in found.passages if passage.kept]
    assert [part for part in found.prompt.split("\n\n") if part != "[...]"] == kept
    assert found.passages[0].kept and found.passages[-1].kept
    pieces = ["[...]" if not one.kept else one.text.strip() for one in found.passages]
    marked = [x for i, x in enumerate(pieces) if x != "[...]" or pieces[i - 1] != x]
    assert found.prompt.split("\n\n") == marked


@pytest.mark.parametrize(
    "method", [None, "window:w=16", "antidiagonal:block=16,stride=4,mass=0.5 + quest:k=16"]
)
def test_the_attention_of_a_real_model_finds_the_needle(smollm2: tuple[Any, Any], method: str | None) -> None:
    """With the same result whichever method the model is patched with; the patch stays as it was."""
    model, tokenizer = smollm2
    if method is None:
        found = farspan.compress(model, tokenizer, PROMPT, keep=0.3)
        assert not hasattr(model.model.layers[0].self_attn, "_farspan")
    else:
        with farspan.patch(model, method) as patched:
            model(torch.arange(40)[None], use_cache=False)
            before = patched.report().to_dict()
            found = farspan.compress(model, tokenizer, PROMPT, keep=0.3)
            assert patched.report().to_dict() == before
    check(found, tokenizer, 0.3)
    assert FACTS[3] in found.prompt and found.query == QUESTION
    scores = {one.text.strip(): one.score for one in found.passages if one.score is not None}
    assert max(scores, key=lambda text: scores[text]) == FACTS[3]
    assert found.tokens_scored > sum(one.tokens for one in found.passages) - 20 and found.seconds > 0
    other = farspan.compress(model, tokenizer, PROMPT, "Where is the red lamp kept?", keep=0.3)
    assert FACTS[0] in other.prompt and other.prompt.endswith(QUESTION)


def test_what_fits_is_kept_by_score() -> None:
    """Of passages of one size, those with the highest scores and no others; with keep=1 all are."""
    model, tokenizer = make("llama", max_position_embeddings=2048), OfCharacters()
    prompt = "Head.\n\n" + "".join(f"Passage number {i:02}.\n\n" for i in range(20)) + "Why?"
    found = compress(model, tokenizer, prompt, keep=0.5)
    body = found.passages[1:-1]
    kept = [one.score for one in body if one.kept]
    left = [one.score for one in body if not one.kept]
    assert kept and left and min(kept) > max(left)
    assert found.tokens_after <= 0.5 * found.tokens_before < found.tokens_after + 20 + 7
    whole = compress(model, tokenizer, prompt, keep=1)
    assert whole.prompt == prompt and whole.tokens_scored == 0
    assert found.to_dict()["passages"][0] == {"text": "Head.\n\n", "tokens": 5, "score": None, "kept": True}


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"keep": 0}, "above 0 and at most 1; got 0"),
        ({"keep": math.nan}, "above 0 and at most 1; got nan"),
        ({"keep": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"prompt": " \n"}, "The prompt is empty"),
        ({"query": " "}, "The query is empty"),
        (
            {"keep": 0.05},
            "keep=0.05 of 616 tokens leaves 30, and the question with the head of the prompt has 63",
        ),
        ({"passage": 0}, "passage is a number of tokens, at least 1"),
        ({"piece": 0}, "piece is a number of tokens, at least 1"),
        ({"piece": 40}, "do not fit into a piece of 40"),
        ({"scorer": "nowhere"}, "There is no recipe at nowhere"),
    ],
)
def test_bad_input_ends_in_a_sentence(how: dict[str, Any], sentence: str) -> None:
    given = {"prompt": PROMPT, **how}
    with pytest.raises(FarspanError, match=sentence):
        compress(make("llama", max_position_embeddings=2048), OfCharacters(), **given)


def test_a_model_without_full_attention_is_refused() -> None:
    with pytest.raises(Unsupported, match="no layer with full attention"):
        compress(make("mistral"), OfCharacters(), PROMPT)
