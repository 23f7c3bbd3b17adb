"""Encoders of passages: padding, training on a toy text, recipes, and their use by `compress`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan import FarspanError, Recipe, SpecError
from farspan.runtime.compress.by_vectors import VectorScorer
from farspan.runtime.compress.encoders import ENCODERS, parse_encoder
from farspan.runtime.training.contrastive import PASSAGE, Contrastive

from .small_models import VOCAB, make, snapshot

SPECS = [
    "retriever",
    "retriever:mixer=gated_delta,width=64",
    "hierarchical",
    "hierarchical:mixer=(fnet),block=8",
]
SMALL = {
    "retriever": "retriever:width=32",
    "hierarchical": "hierarchical:mixer=(hydra:head_dim=16,state=8),width=32",
}


class OfCharacters:
    """A tokenizer of one token a character."""

    bos_token_id = eos_token_id = chat_template = None

    def __init__(self, moved: int = 3) -> None:
        self._moved = moved

    def __call__(self, text: str, return_tensors: str | None = None, **_: Any) -> Any:
        ids = [self._moved + ord(c) % (VOCAB - self._moved) for c in text]
        if return_tensors is not None:
            return {"input_ids": torch.tensor([ids])}
        return SimpleNamespace(input_ids=ids)


def toy_text(windows: int, size: int = 512) -> str:
    """Text whose passages of 64 tokens have three letters of their own each, in half of their places. In the
    others stand runs of a few letters that all passages have, so that the mean of a span misleads."""
    made = torch.Generator().manual_seed(2)
    draw = lambda high, count: torch.randint(high, (count,), generator=made)  # noqa: E731
    parts = []
    for _ in range(windows * size // PASSAGE):
        own = (70 + torch.randperm(40, generator=made)[:3])[draw(3, PASSAGE)]
        runs = (40 + draw(6, PASSAGE // 8)).repeat_interleave(8)
        parts.append("".join(map(chr, torch.where(draw(2, PASSAGE) < 1, own, runs).tolist())))
    return "".join(parts)


@pytest.mark.parametrize("spec", SPECS)
def test_padding_changes_no_vector(spec: str) -> None:
    torch.manual_seed(0)
    encoder = parse_encoder(spec, 48).eval()
    with torch.no_grad():
        for name in ("share", "of_block.share", "of_text.share"):  # with which the mixer begins at 0
            if (found := dict(encoder.named_parameters()).get(name)) is not None:
                found.fill_(0.7)
        x = torch.randn(3, 50, 48)
        sizes = [50, 33, 1]
        mask = torch.arange(50) < torch.tensor(sizes)[:, None]
        together = encoder(x, mask)
        for row, size in enumerate(sizes):
            alone = encoder(x[row : row + 1, :size], mask[row : row + 1, :size])
            assert torch.allclose(together[row], alone[0], atol=1e-5)
            assert alone.norm().item() == pytest.approx(1)
        order = x[:1].flip(1)  # the mixers see the order of the tokens
        assert not torch.allclose(encoder(order, mask[:1]), together[:1], atol=1e-3)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_training_finds_the_passage_and_a_recipe_keeps_the_encoder(name: str, tmp_path: Path) -> None:
    model, tokenizer = make("llama"), OfCharacters()
    before = snapshot(model)
    how: dict[str, Any] = {"steps": 100, "window": 512, "held_out": 6, "lr": 3e-3}
    made = farspan.train(model, tokenizer, SMALL[name], toy_text(30), out=tmp_path, **how)
    assert snapshot(model) == before
    first, last = made.settings["held_out"]
    assert first["top1_out"] < 0.7 and last["top1_out"] > 0.9 and last["top1_in"] > 0.9
    saved = Recipe.load(tmp_path)
    assert saved.digest == made.digest and saved.method == name
    texts = [[5 + i, 9 + 2 * i, 30] * (3 + i) for i in range(5)]
    scores = [VectorScorer(model, tokenizer, one)([], texts, texts[2]).scores for one in (made, saved)]
    assert scores[0] == scores[1]
    assert scores[0].index(max(scores[0])) == 2 and scores[0][2] == pytest.approx(1, abs=1e-5)
    other, asked = "BC" * 20 + ".\n\n", "DE" * 20 + ".\n\n"  # longer than the marks that replace them
    prompt = "A.\n\n" + (other + asked) * 6 + "DEED"
    found = farspan.compress(model, tokenizer, prompt, keep=0.5, scorer=tmp_path)
    kept = {one.text for one in found.passages[1:-1] if one.kept}
    assert kept == {asked} and found.scorer == name
    assert found.tokens_scored == 4 + sum(one.tokens for one in found.passages[1:-1])


def test_a_recipe_is_bound_to_model_and_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = make("llama"), OfCharacters()
    objective = Contrastive(model, tokenizer, SMALL["retriever"])
    recipe = objective.recipe({})
    VectorScorer(model, tokenizer, recipe)
    with pytest.raises(FarspanError, match=r"made for another model: fingerprint .* farspan train retriever"):
        VectorScorer(make("llama", seed=1), tokenizer, recipe)
    with pytest.raises(FarspanError, match="made for another model: tokenizer"):
        VectorScorer(model, OfCharacters(moved=4), recipe)
    with pytest.raises(FarspanError, match="is for seer, not for a scorer of passages"):
        VectorScorer(model, tokenizer, Recipe(method="seer", geometry={}, settings={}, tensors={}))
    broken = Recipe(
        method="retriever", geometry=recipe.geometry, settings={}, tensors={}, parameters=recipe.parameters
    )
    with pytest.raises(FarspanError, match="not those of a retriever encoder"):
        VectorScorer(model, tokenizer, broken)
    with pytest.raises(FarspanError, match="give the same spec"):
        Contrastive(model, tokenizer, "retriever:width=64", recipe)
    begun = Contrastive(model, tokenizer, SMALL["retriever"], recipe).recipe({})
    assert begun.digest == recipe.digest


def test_the_loss_is_infonce() -> None:
    """Against its definition in float64, with the spans that the seed draws."""
    model = make("llama")
    objective = Contrastive(model, OfCharacters(), SMALL["retriever"])
    ids = torch.randint(3, VOCAB, (1, 256), generator=torch.Generator().manual_seed(4))
    kept: list[Tensor] = []
    torch.manual_seed(7)
    loss = objective.backward(ids, SimpleNamespace(backward=lambda x: (kept.append(x), x.backward())))
    torch.manual_seed(7)
    out = bool(torch.rand(()) < 0.5)
    length = int(torch.randint(8, 25, ()))
    first = torch.randint(64 - length + 1, (4, 1))
    passages, queries = [], []
    for row, at in zip(ids.view(4, 64).tolist(), first.flatten().tolist(), strict=True):
        queries.append(row[at : at + length])
        passages.append(row[:at] + row[at + length :] if out else row)
    embed, encoder = model.get_input_embeddings(), objective._encoder
    with torch.no_grad():
        a, b = (
            encoder(embed(torch.tensor(x)), torch.ones(4, len(x[0]), dtype=torch.bool)).double()
            for x in (queries, passages)
        )
    wanted = -((a @ b.T / 0.05).log_softmax(1).diagonal()).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and len(kept) == 1
    assert all(p.grad is not None for p in objective.parameters() if p is not encoder.end)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("retriever:width=30", "a width that 4 heads divide; got width=30"),
        ("retriever:mixer=fnet", "fnet reads later tokens"),
        ("retriever:mixer=mamba3", "no mixer 'mamba3'"),
        ("hierarchical:mixer=mamba2", "no encoder mixer 'mamba2'"),
        ("hierarchical:block=0", "sizes of at least 1"),
        ("hierarchical:depth=2", "no parameter 'depth'"),
        ("smith", "no encoder 'smith'"),
    ],
)
def test_a_bad_spec_ends_in_a_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        parse_encoder(spec, 48)


def test_training_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    model, tokenizer = make("llama"), OfCharacters()
    how: dict[str, Any] = {"out": tmp_path, "steps": 1, "held_out": 1}
    with pytest.raises(FarspanError, match="give windows of at least 128 tokens"):
        farspan.train(model, tokenizer, "retriever", toy_text(2), window=64, **how)
    with pytest.raises(FarspanError, match="for methods of attention, not for retriever"):
        farspan.train(model, tokenizer, "retriever", toy_text(2), window=256, tune="lora", **how)
