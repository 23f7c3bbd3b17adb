"""Contrastive training of an encoder of passages, on passages of a text and spans cut out of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...attention.errors import FarspanError
from ..compress.by_vectors import bound_to, encoder_of
from ..compress.encoders import parse_encoder
from ..recipe import Recipe

PASSAGE = 64  # tokens
QUERY = (8, 24)  # the fewest and the most tokens of a span
_TEMPERATURE = 0.05
_SEED = 0  # of the spans of held-out windows


class Contrastive:
    """An encoder that finds the passage which a span was cut from (an ``Objective``): the inverse cloze task
    (arXiv 1906.00300) with InfoNCE over the passages of one window, which are each other's negatives.

    The tokens of a window are cut into passages of 64. A span of 8 to 24 tokens of each one is a query. In
    half of the steps the span is taken out of its passage, so that the encoder learns what belongs together;
    in the others it stays, so that it learns to find words again. The loss is the mean cross-entropy of the
    cosines of all pairs, divided by 0.05. On held-out windows, "top1_in" and "top1_out" are the shares of
    queries whose own passage has the highest cosine, where spans stay and where they are taken out.

    The embeddings of the model are read and do not change. start: a recipe whose weights training begins
    with. Raises SpecError for a bad spec, and FarspanError for a ``start`` of another encoder or model.
    """

    def __init__(self, model: Any, tokenizer: Any, spec: str, start: Recipe | None = None) -> None:
        self._embed = model.get_input_embeddings()
        self._bound = bound_to(model, tokenizer)
        self._encoder = parse_encoder(spec, self._embed.weight.shape[1])
        self._encoder.fit(self._embed.weight)
        if start is not None:
            begun = encoder_of(model, tokenizer, start)
            if (begun.name, begun.made_with) != (self._encoder.name, self._encoder.made_with):
                raise FarspanError(
                    f"The recipe to begin with is of {begun.name} with {begun.made_with}, and the spec has "
                    f"{self._encoder.name} with {self._encoder.made_with}: give the same spec."
                )
            self._encoder = begun
        self._encoder.to(self.device)

    @property
    def device(self) -> torch.device:
        return torch.device(self._embed.weight.device)

    @property
    def settings(self) -> dict[str, Any]:
        return {"passage": PASSAGE, "query": list(QUERY), "temperature": _TEMPERATURE}

    def parameters(self) -> list[nn.Parameter]:
        return list(self._encoder.parameters())

    def state(self) -> dict[str, Tensor]:
        return self._encoder.state_dict()

    def backward(self, ids: Tensor, accelerator: Any) -> Tensor:
        passages, queries = _drawn(_passages(ids), None, out=bool(torch.rand(()) < 0.5))
        with torch.enable_grad():
            cosines = self._cosines(queries, passages)
            own = torch.arange(len(passages), device=cosines.device)
            loss = cross_entropy(cosines / _TEMPERATURE, own)
            accelerator.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, ids: Tensor) -> dict[str, float]:
        self._encoder.eval()
        found, losses = {}, []
        for out, name in ((False, "top1_in"), (True, "top1_out")):
            generator = torch.Generator().manual_seed(_SEED)
            passages, queries = _drawn(_passages(ids), generator, out)
            own = torch.arange(len(passages))
            cosines = self._cosines(queries, passages).cpu()
            found[name] = (cosines.argmax(1) == own).double().mean().item()
            losses.append(cross_entropy(cosines / _TEMPERATURE, own).item())
        self._encoder.train()
        return {**found, "loss": sum(losses) / len(losses)}

    def _cosines(self, queries: Tensor, passages: Tensor) -> Tensor:
        """[N, N] of queries [N, Q] and passages [N, P]."""
        asked, there = (
            self._encoder(self._embed(ids).float(), torch.ones_like(ids, dtype=torch.bool))
            for ids in (queries.to(self.device), passages.to(self.device))
        )
        return asked @ there.T

    def recipe(self, settings: dict[str, Any]) -> Recipe:
        tensors = {name: x.detach().cpu().clone() for name, x in self._encoder.state_dict().items()}
        return Recipe(
            method=self._encoder.name,
            geometry=dict(self._bound),
            settings=settings,
            tensors=tensors,
            parameters=self._encoder.made_with,
        )

    def close(self) -> None:
        pass


def _passages(ids: Tensor) -> Tensor:
    """The passages [N, 64] of a window [1, T]. Raises FarspanError where there are not two."""
    count = ids.shape[1] // PASSAGE
    if count < 2:
        raise FarspanError(
            f"A window of {ids.shape[1]} tokens has {count} passages of {PASSAGE}, and an encoder learns to "
            f"choose among them: give windows of at least {2 * PASSAGE} tokens."
        )
    return ids[0, : count * PASSAGE].view(count, PASSAGE)


def _drawn(passages: Tensor, generator: torch.Generator | None, out: bool) -> tuple[Tensor, Tensor]:
    """(passages, queries [N, Q]): a span of each passage, of one random length Q. out: the passages come
    without their spans, [N, 64 - Q]."""
    count, size = passages.shape
    length = int(torch.randint(QUERY[0], QUERY[1] + 1, (), generator=generator))
    first = torch.randint(size - length + 1, (count, 1), generator=generator)
    place = torch.arange(size)
    inside = (place >= first) & (place < first + length)
    queries = passages[inside].view(count, length)
    return (passages[~inside].view(count, -1) if out else passages), queries
