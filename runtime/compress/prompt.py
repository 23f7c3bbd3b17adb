"""farspan.compress: a shorter prompt of the passages that a question needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from ..models import choose_chat, plain_ids, prompt_ids
from ..recipe import Recipe
from .by_attention import AttentionScorer
from .by_vectors import VectorScorer
from .passages import cut_passages, first_part, last_part
from .scored import Scorer
from .spec import ATTENTION, KEEP, MARK, PASSAGE, PIECE, check_keep


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A passage of a prompt, with the white space behind it, and whether it was kept.

    score: None for the head and the question, which are not scored, and where everything was kept.
    """

    text: str = field(repr=False)
    tokens: int
    score: float | None
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A shortened prompt, and how it was made.

    passages: all of the old prompt, in their order; their texts together are the old prompt. query: what
    they were scored for. tokens_before, tokens_after: of the two prompts, without a chat format. scorer: its
    name. tokens_scored, seconds: what the scorer has read, and how long it took.
    """

    prompt: str
    query: str
    passages: tuple[Passage, ...]
    tokens_before: int
    tokens_after: int
    scorer: str
    tokens_scored: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the prompt."""
        own = {name: x for name, x in vars(self).items() if name != "prompt"}
        return {**own, "passages": [asdict(passage) for passage in self.passages]}

    def __str__(self) -> str:
        kept = sum(passage.kept for passage in self.passages)
        return (
            f"{kept} of {len(self.passages)} passages are kept, {self.tokens_after} of {self.tokens_before} "
            f"tokens. The scorer ({self.scorer}) read {self.tokens_scored} tokens in {self.seconds:.1f} s."
        )


def compress(
    model: Any,
    tokenizer: Any,
    prompt: str,
    query: str | None = None,
    *,
    keep: float = KEEP,
    scorer: str | Path | Recipe = ATTENTION,
    passage: int = PASSAGE,
    piece: int = PIECE,
    mark: str = MARK,
) -> Compressed:
    """Leave out of ``prompt`` the passages that its question needs least.

    A passage is a paragraph; a long paragraph is cut into sentences, packed to about ``passage`` tokens (see
    ``cut_passages``). Those with the highest scores stay, whole and in their order, as many as fit; ``mark``
    stands where some were left out. The head of the prompt (its first paragraph, or the first sentence of a
    long one) and its question always stay.

    prompt: the text of a user's message; a chat format is applied to the result.
    query: what the passages are scored for. It is the question where the prompt ends with it. Otherwise the
    question is the prompt's last paragraph, or the last sentence of a long one; it is also the default.
    keep: the most tokens of the result, as a fraction of the prompt's; head, question and marks count.
    scorer: "attention" is the model's own attention (``AttentionScorer``), which needs no training. A recipe
    of ``farspan train retriever`` or ``farspan train hierarchical``, or its folder, is a small encoder
    (``VectorScorer``), which takes a fraction of the model's time.
    piece: tokens that the model reads at once for "attention".

    The model may be patched with any method, and stays as it was. Raises FarspanError for an empty prompt or
    query, a ``keep`` outside (0, 1] or without room for head and question, and a recipe of another model or
    tokenizer. Raises Unsupported for a model whose attention cannot be observed.
    """
    check_keep(keep)
    if passage < 1:
        raise FarspanError(f"passage is a number of tokens, at least 1; got {passage}.")
    for name, text in (("prompt", prompt), ("query", query)):
        if text is not None and not text.strip():
            raise FarspanError(f"The {name} is empty: give at least one word.")
    chosen = scorer_of(model, tokenizer, scorer, piece)
    parts = _Parts.of(tokenizer, prompt, query, passage, mark)
    query = (query or parts.tail).strip()
    before = len(plain_ids(tokenizer, prompt))
    budget = int(keep * before)
    scores: Sequence[float | None] = [None] * len(parts.body)
    kept, read, started = [True] * len(parts.body), 0, time.perf_counter()
    if before > budget:
        least = parts.length([False] * len(parts.body))
        if least > budget:
            raise FarspanError(
                f"keep={keep:g} of {before} tokens leaves {budget}, and the question with the head of the "
                f"prompt has {least}: give a larger keep, or a shorter question."
            )
        opening = prompt_ids(choose_chat(tokenizer, False), parts.head.rstrip()) if parts.head else []
        found = chosen(opening, parts.ids[1:-1], plain_ids(tokenizer, query))
        scores, read = found.scores, found.read
        kept = _best(parts, found.scores, budget)
    tokens = [len(one) for one in parts.ids]
    columns = zip(parts.texts, tokens, [None, *scores, None], [True, *kept, True], strict=True)
    return Compressed(
        prompt=parts.joined(kept),
        query=query,
        passages=tuple(Passage(text=x, tokens=n, score=y, kept=k) for x, n, y, k in columns if x),
        tokens_before=before,
        tokens_after=parts.length(kept),
        scorer=chosen.name,
        tokens_scored=read,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """A prompt in parts: its head (may be empty), the passages that may be left out, and its question.

    ids: the tokens of each part. The white space between two parts counts to the later one, because most
    tokenizers join it with the next word.
    """

    tokenizer: Any
    head: str
    body: list[str]
    tail: str
    mark: str
    ids: list[list[int]]

    @staticmethod
    def of(tokenizer: Any, prompt: str, query: str | None, passage: int, mark: str) -> _Parts:
        """The parts of a prompt with passages of about ``passage`` tokens."""

        def count(texts: list[str]) -> list[int]:
            return [len(plain_ids(tokenizer, text.strip())) for text in texts]

        asked = "" if query is None else query.strip()
        end = len(prompt.rstrip())
        known = bool(asked) and prompt[:end].endswith(asked)
        tail = prompt[end - len(asked) :] if known else last_part(prompt, passage, count)
        rest = prompt[: len(prompt) - len(tail)]
        head = first_part(rest, passage, count) if rest.strip() else rest
        body = cut_passages(rest[len(head) :], passage, count)
        texts = [head, *body, tail]
        spaces = ["", *(text[len(text.rstrip()) :] for text in texts)]
        ids = [plain_ids(tokenizer, a + b.rstrip()) for a, b in zip(spaces, texts, strict=False)]
        return _Parts(tokenizer=tokenizer, head=head, body=body, tail=tail, mark=mark, ids=ids)

    @property
    def texts(self) -> list[str]:
        return [self.head, *self.body, self.tail]

    def joined(self, kept: Sequence[bool]) -> str:
        """The prompt with those passages that are kept. The white space behind a mark is that behind the
        last passage that it stands for."""
        written: list[str] = []
        before = True
        for text, here in zip(self.texts, [True, *kept, True], strict=True):
            if not here:
                if not before:
                    written.pop()
                written.append(self.mark + text[len(text.rstrip()) :])
            else:
                written.append(text)
            before = here
        return "".join(written)

    def length(self, kept: Sequence[bool]) -> int:
        """The tokens of ``joined``."""
        return len(plain_ids(self.tokenizer, self.joined(kept)))


def _best(parts: _Parts, scores: Sequence[float], budget: int) -> list[bool]:
    """Which passages to keep: those with the highest scores that fit into ``budget`` tokens, with a mark in
    each gap; the earlier one of two equal ones."""
    sizes = [len(one) for one in parts.ids]
    mark = len(plain_ids(parts.tokenizer, f" {parts.mark}"))
    kept = [True, *(False for _ in parts.body), True]
    left = budget - sizes[0] - sizes[-1] - mark
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    for i in order:
        gaps = (not kept[i]) + (not kept[i + 2]) - 1  # more gaps than without this passage
        if sizes[i + 1] + gaps * mark <= left:
            kept[i + 1] = True
            left -= sizes[i + 1] + gaps * mark
    chosen = kept[1:-1]
    for i in reversed(order):
        if parts.length(chosen) <= budget:  # a tokenizer may need more for the whole than for its parts
            break
        chosen[i] = False
    return chosen


def scorer_of(model: Any, tokenizer: Any, scorer: str | Path | Recipe, piece: int = PIECE) -> Scorer:
    """The scorer that ``compress`` is given by name, recipe or folder. Raises FarspanError and Unsupported
    as it does."""
    if scorer == ATTENTION:
        return AttentionScorer(model, tokenizer, piece)
    recipe = scorer if isinstance(scorer, Recipe) else Recipe.load(scorer)
    return VectorScorer(model, tokenizer, recipe)
