"""A synthetic retrieval probe: short texts of keys and values in which every value comes twice.

Recall sits in few heads and hardly shows in perplexity (2504.18574, 2507.06457), so layers are judged by the
loss of values that can only be looked up, too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .student import Student

_KINDS = ("red", "old", "small", "quiet", "green", "heavy", "round", "wooden")
_THINGS = ("door", "river", "lamp", "garden", "engine", "letter", "bridge", "tower")


@dataclass(frozen=True)
class ProbeText:
    """One text of the probe. ids: [1, T]. answers: the positions of the tokens of values that came before."""

    ids: Tensor
    answers: Tensor


def probe_texts(
    tokenizer: Any, *, texts: int = 3, pairs: int = 16, seed: int = 0, positions: int | None = None
) -> list[ProbeText]:
    """Texts of ``pairs`` lines "The code of the red door is 48213.", then the same lines in another order.
    positions: of the model; the number of pairs is halved until the texts fit. None: there is no limit."""
    draw = random.Random(seed)
    made = [_text(tokenizer, draw, pairs) for _ in range(texts)]
    if positions is not None and pairs > 1 and max(text.ids.shape[1] for text in made) > positions:
        return probe_texts(tokenizer, texts=texts, pairs=pairs // 2, seed=seed, positions=positions)
    return made


def _text(tokenizer: Any, draw: random.Random, pairs: int) -> ProbeText:
    names = draw.sample([f"{kind} {thing}" for kind in _KINDS for thing in _THINGS], pairs)
    codes = {name: str(draw.randrange(10_000, 100_000)) for name in names}
    again = draw.sample(names, pairs)
    ids, answers = _first(tokenizer), list[int]()
    for turn, order in enumerate((names, again)):
        for name in order:
            ids += _ids(tokenizer, f"The code of the {name} is")
            code = _ids(tokenizer, f" {codes[name]}")
            if turn:
                answers += range(len(ids), len(ids) + len(code))
            ids += code + _ids(tokenizer, ".\n")
    return ProbeText(torch.tensor([ids]), torch.tensor(answers))


def _ids(tokenizer: Any, text: str) -> list[int]:
    found = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    return [int(x) for x in found]


def _first(tokenizer: Any) -> list[int]:
    """The token with which the tokenizer begins a text, if it does."""
    begin = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("The", return_tensors="pt", verbose=False)["input_ids"][0]
    return [int(begin)] if begin is not None and int(ids[0]) == begin else []


@torch.no_grad()
def retrieval_loss(student: Student, texts: list[ProbeText], layers: list[int]) -> float:
    """The mean negative log-likelihood (nats a token) of the values to look up, with mixers in ``layers``."""
    losses = []
    with student.autocast(), student.mixed(layers):
        for text in texts:
            ids = text.ids.to(student.device)
            output = student.head.hidden(ids)
            before, following = text.answers - 1, text.answers
            hidden = output.last_hidden_state[:, before]
            logits = student.head.logits(output, hidden, ids[:, before]).float()
            losses.append(cross_entropy(logits[0], ids[0, following], reduction="none"))
    return torch.cat(losses).mean().item()
