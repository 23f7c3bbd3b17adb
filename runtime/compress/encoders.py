"""Small encoders by which passages are found: embeddings of tokens in, a vector of unit length out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from ...attention.errors import SpecError
from ...attention.hybrid.geometry import Geometry
from ...attention.hybrid.registry import parse_encoder_mixer, parse_mixer, values_of
from ...attention.spec import find, split_spec

_HEADS = 4  # of a mixer


class Encoder(nn.Module):
    """Embeddings [B, T, hidden] of texts -> [B, width], of unit length, so that a product is a cosine.

    Each number of an embedding is standardised by its mean and deviation over the vocabulary (``fit``). A
    large mean, which is common, would make all texts alike at first.

    A subclass is made by ``Encoder(hidden_size, *, parameters)``, as mixers are. width: numbers of a hidden
    state and of the result. Raises SpecError for sizes below 1, a width that heads do not divide, and a
    mixer that does not exist.
    """

    name: ClassVar[str]
    mean: Tensor
    deviation: Tensor

    def __init__(self, hidden_size: int, width: int, **parameters: Any) -> None:
        super().__init__()
        numbers = {"width": width, **{k: x for k, x in parameters.items() if isinstance(x, int)}}
        if min(numbers.values()) < 1 or width % _HEADS:
            given = ", ".join(f"{key}={x}" for key, x in numbers.items())
            raise SpecError(
                f"{self.name} takes sizes of at least 1 and a width that {_HEADS} heads divide; got {given}."
            )
        self.made_with: dict[str, Any] = {"width": width, **parameters}
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("deviation", torch.ones(hidden_size))
        self.project = nn.Linear(hidden_size, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """mask: [B, T] bool, True at tokens, which come first in each row."""
        hidden = self.project((embedded - self.mean) / self.deviation)
        return normalize(self.out(self.pooled(hidden, mask)).float(), dim=1)

    @torch.no_grad()
    def fit(self, embeddings: Tensor) -> None:
        """Standardise by all embeddings [V, hidden] of the model."""
        self.mean.copy_(embeddings.float().mean(0))
        self.deviation.copy_(embeddings.float().std(0).clamp(min=1e-6))

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, T, width] -> [B, width], a vector for each text."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a text becomes one vector.")


class Recurrent(Encoder):
    """A recurrent mixer reads the text and then a learned end token. Its output at this token, which reads
    the last state, makes the text's vector (Mamba Retriever, arXiv 2408.08066), beside the mean of the
    tokens, with which training begins.

    mixer: the spec of a recurrent mixer, such as mamba2 or gated_delta; in parentheses if it has parameters.
    """

    name: ClassVar[str] = "retriever"

    def __init__(self, hidden_size: int, *, mixer: str = "mamba2", width: int = 128) -> None:
        super().__init__(hidden_size, width, mixer=mixer)
        shape = Geometry(hidden_size=width, num_heads=_HEADS, num_kv_heads=_HEADS, head_dim=width // _HEADS)
        self.end = nn.Parameter(torch.randn(width) / width**0.5)
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mixer = parse_mixer(_bare(mixer), shape)
        self.share = nn.Parameter(torch.zeros(width))  # of the mixer

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(1)
        rows = torch.arange(len(hidden), device=hidden.device)
        hidden = hidden.masked_fill(~mask[..., None], 0)
        mean = hidden.sum(1) / count[:, None]
        real = pad(mask, (0, 1))
        real[rows, count] = True
        at_end = real & ~pad(mask, (0, 1))
        hidden = torch.where(at_end[..., None], self.end.to(hidden.dtype), pad(hidden, (0, 0, 0, 1)))
        read = self.mixer(self.before(hidden), None, real)[0][rows, count]
        return self.after(mean + self.share * read)


class Hierarchical(Encoder):
    """Blocks of ``block`` tokens become vectors, and an encoder over these makes the vector of the text
    (SMITH, arXiv 2004.12297). In both, an encoder mixer reads the sequence, and the attention of a learned
    query pools it; training begins with the mean.

    mixer: the spec of an encoder mixer; in parentheses if it has parameters.
    """

    name: ClassVar[str] = "hierarchical"

    def __init__(self, hidden_size: int, *, mixer: str = "hydra", width: int = 128, block: int = 32) -> None:
        super().__init__(hidden_size, width, mixer=mixer, block=block)
        self.block = block
        self.of_block, self.of_text = (_Pooled(_bare(mixer), width) for _ in range(2))

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        more = -hidden.shape[1] % self.block
        blocks = pad(hidden, (0, 0, 0, more)).unflatten(1, (-1, self.block))  # [B, N, block, width]
        real = pad(mask, (0, more)).unflatten(1, (-1, self.block))
        there = real.any(2)
        vectors = blocks.new_zeros(*there.shape, blocks.shape[3])
        vectors[there] = self.of_block(blocks[there], real[there]).to(vectors.dtype)
        return self.of_text(vectors, there)


class _Pooled(nn.Module):
    """An encoder mixer beside a residual, pooled by the attention of one learned query."""

    def __init__(self, mixer: str, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mixer = parse_encoder_mixer(mixer, width)
        self.share = nn.Parameter(torch.zeros(width))  # of the mixer
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, T, width], of which mask [B, T] is True at what is there -> [B, width]."""
        hidden = hidden + self.share * self.mixer(self.before(hidden), mask)
        logits = (self.after(hidden) @ self.query).float().masked_fill(~mask, -torch.inf)
        weights = logits.softmax(1).to(hidden.dtype)[..., None]
        return (hidden.masked_fill(~mask[..., None], 0) * weights).sum(1)


ENCODERS: dict[str, type[Encoder]] = {one.name: one for one in (Recurrent, Hierarchical)}


def names_encoder(spec: str) -> bool:
    """Whether a spec names an encoder and not an attention method."""
    return split_spec(spec)[0] in ENCODERS


def parse_encoder(spec: str, hidden_size: int) -> Encoder:
    """An encoder with fresh weights from ``"name"`` or ``"name:par=value,par=value"``. Raises SpecError for
    an unknown name, parameter or mixer, and for a value that it cannot take."""
    name, text = split_spec(spec)
    cls = find("encoder", name, ENCODERS)
    return cls(hidden_size, **values_of(name, text, cls))


def _bare(mixer: str) -> str:
    """A mixer's spec without the parentheses around it."""
    return mixer[1:-1] if mixer[:1] == "(" and mixer[-1:] == ")" else mixer
