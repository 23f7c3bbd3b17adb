"""The two-layer models of MQAR."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .data import Examples
from .layers import SAME, make_layers


class Model(nn.Module):
    """Embedding; two layers x + mixer(norm(x)); norm; the embedding again as the head. There is no MLP.

    Learned positions are added to the embedding where the first layer attends, since attention has no order
    of its own; elsewhere there are none, as published. length: of the longest sequences. dropout: of the
    embedding's output and of each layer's, in training. encoders: whether layers may be encoder mixers.
    """

    def __init__(
        self,
        spec: str,
        *,
        dim: int,
        length: int,
        vocabulary: int,
        heads: int = 1,
        first: str = SAME,
        dropout: float = 0.0,
        encoders: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.layers = nn.ModuleList(make_layers(spec, dim, heads, length, first, encoders))
        self.positions = nn.Embedding(length, dim) if self.layers[0].attends else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.layers)
        self.last_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, examples: Examples) -> Tensor:
        """Logits [N, pairs, vocabulary] at the queries' positions alone: elsewhere nothing is asked."""
        x = self.tokens(examples.tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: x.shape[1]]
        x = self.dropout(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + self.dropout(layer(norm(x), examples.real))
        asked = x.gather(1, examples.places[..., None].expand(-1, -1, x.shape[2]))
        return self.last_norm(asked) @ self.tokens.weight.T

    def accuracy(self, examples: Examples, rows: int) -> float:
        """The share of queries answered right; ``rows`` sequences at once."""
        self.eval()
        with torch.no_grad():
            right = [
                (self(part).argmax(-1) == part.answers).sum()
                for first in range(0, len(examples), rows)
                for part in [examples[first : first + rows]]
            ]
        return int(torch.stack(right).sum()) / examples.answers.numel()

    def state_bytes(self, length: int) -> list[int]:
        """What each layer keeps of one sequence, in bytes."""
        return [layer.state_bytes(length) for layer in self.layers]
