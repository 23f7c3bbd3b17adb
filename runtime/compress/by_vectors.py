"""Score passages by a small trained encoder: the cosine of the vectors of query and passage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...attention.errors import FarspanError
from .. import hf
from ..identity import hash_of, tokenizer_facts
from ..recipe import Recipe
from .encoders import ENCODERS, Encoder
from .scored import Ids, Scored

_ROWS = 256  # passages encoded at a time


class VectorScorer:
    """The cosine of the vectors that a trained encoder gives to a passage and to the query, from the frozen
    embeddings of their tokens. recipe: of ``farspan train retriever`` or ``farspan train hierarchical``.

    Raises FarspanError for a recipe of something else, of another model or of another tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, recipe: Recipe) -> None:
        self._embed = model.get_input_embeddings()
        self.name = recipe.method
        self._encoder = encoder_of(model, tokenizer, recipe).eval().to(model.device)

    @torch.no_grad()
    def __call__(self, opening: Ids, passages: Sequence[Ids], query: Ids) -> Scored:
        """See ``Scorer``. The opening is not read."""
        [asked] = self._vectors([query])
        parts = [self._vectors(passages[a : a + _ROWS]) @ asked for a in range(0, len(passages), _ROWS)]
        return Scored(torch.cat(parts).tolist(), sum(map(len, passages)) + len(query))

    def _vectors(self, texts: Sequence[Ids]) -> Tensor:
        """[N, width] of N texts."""
        device = self._embed.weight.device
        ids = pad_sequence([torch.tensor(list(text), dtype=torch.long) for text in texts], batch_first=True)
        sizes = torch.tensor([len(text) for text in texts])
        mask = torch.arange(ids.shape[1]) < sizes[:, None]
        return self._encoder(self._embed(ids.to(device)).float(), mask.to(device))


def encoder_of(model: Any, tokenizer: Any, recipe: Recipe) -> Encoder:
    """The trained encoder of a recipe. Raises FarspanError as ``VectorScorer`` does."""
    if recipe.method not in ENCODERS:
        raise FarspanError(
            f"This recipe is for {recipe.method}, not for a scorer of passages: give one of 'farspan train "
            f"{' or '.join(ENCODERS)}'."
        )
    recipe.check_geometry(bound_to(model, tokenizer), f"farspan train {recipe.method}")
    encoder = ENCODERS[recipe.method](model.get_input_embeddings().weight.shape[1], **recipe.parameters)
    try:
        encoder.load_state_dict(dict(recipe.tensors))
    except RuntimeError as error:
        raise FarspanError(
            f"The tensors of this recipe are not those of a {recipe.method} encoder "
            f"({str(error).splitlines()[-1].strip()}): make it again with 'farspan train {recipe.method}'."
        ) from error
    return encoder


def bound_to(model: Any, tokenizer: Any) -> Mapping[str, Any]:
    """What a recipe of an encoder keeps of the model and of the tokenizer that it was made for."""
    return {**hf.inspect_model(model).geometry, "tokenizer": hash_of(tokenizer_facts(tokenizer))}
