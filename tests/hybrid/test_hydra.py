"""Hydra against its dense quasiseparable matrix in float64, and in place of a tiny BERT's attention."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import farspan
from farspan import FarspanError, SpecError, Unsupported
from farspan.attention.hybrid import encoder_mixers, mixers, parse_encoder_mixer
from farspan.attention.hybrid.hydra import Hydra
from farspan.runtime.hf import put_encoder_mixers

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def made(seed: int = 0) -> Hydra:
    torch.manual_seed(seed)
    hydra = Hydra(16, head_dim=8, state=5).double()
    for p in hydra.parameters():
        nn.init.normal_(p, std=0.5)
    return hydra


def naive(hydra: Hydra, hidden: Tensor) -> Tensor:
    """hidden [T, 16] -> [T, 16]: the matrix of each head, entry by entry."""
    w = {name: p.detach() for name, p in hydra.named_parameters()}
    t, width, n = len(hidden), 32, 5
    projected = hidden @ w["in_proj.weight"].T
    z, mixed, dt = projected[:, :32], projected[:, 32:84], projected[:, 84:]
    conv = torch.zeros(t, 52).double()
    for i in range(t):
        for tap in range(7):
            if 0 <= i + tap - 3 < t:
                conv[i] += w["conv1d.weight"][:, 0, tap] * mixed[i + tap - 3]
    conv = nn.functional.silu(conv + w["conv1d.bias"])
    x = conv[:, :width]
    b, c, b_back, c_back = (conv[:, width + n * k : width + n * (k + 1)] for k in range(4))
    y = torch.zeros(t, width).double()
    for h in range(4):
        a = -float(w["A_log"][h].exp())
        ahead, behind = (torch.log1p((dt[:, h + 4 * k] + w["dt_bias"][h]).exp()) for k in range(2))
        matrix = torch.zeros(t, t).double()
        for i in range(t):
            for j in range(t):
                if j < i:
                    gap = sum(float(ahead[m]) for m in range(j + 1, i))
                    matrix[i, j] = c[i - 1] @ b[j] * ahead[j] * math.exp(a * gap)
                elif j > i:
                    gap = sum(float(behind[m]) for m in range(i + 1, j))
                    matrix[i, j] = c_back[i + 1] @ b_back[j] * behind[j] * math.exp(a * gap)
                else:
                    matrix[i, i] = w["fc_D.weight"][h] @ x[i] + w["D"][h]
        y[:, 8 * h : 8 * h + 8] = matrix @ x[:, 8 * h : 8 * h + 8]
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"]
    return (y * nn.functional.silu(z)) @ w["out_proj.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 19])
def test_the_quasiseparable_matrix(length: int) -> None:
    hydra, x = made(), torch.randn(length, 16).double()
    assert torch.allclose(hydra(x[None])[0], naive(hydra, x), atol=1e-11)


@torch.no_grad()
def test_padding_on_any_side_changes_nothing() -> None:
    hydra, x = made(1), torch.randn(3, 20, 16).double()
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 13:] = mask[2, :6] = False
    out = hydra(x, mask)
    assert torch.allclose(out[0], naive(hydra, x[0]), atol=1e-11)
    assert torch.allclose(out[1, :13], naive(hydra, x[1, :13]), atol=1e-11)
    assert torch.allclose(out[2, 6:], naive(hydra, x[2, 6:]), atol=1e-11)


def test_it_starts_as_published_and_trains() -> None:
    torch.manual_seed(0)
    hydra = Hydra(64)
    step = nn.functional.softplus(hydra.dt_bias)
    assert bool((step >= 1e-4).all() and (step <= 0.1001).all() and (hydra.A_log == 0).all())
    hydra(torch.randn(1, 10, 64)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in hydra.parameters())


class _Naive(nn.Module):
    """The definition in BERT's place for its attention, for rows without padding."""

    def __init__(self, hydra: Hydra) -> None:
        super().__init__()
        self.twin = [hydra]

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return torch.stack([naive(self.twin[0], row) for row in hidden_states]), None


@torch.no_grad()
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_in_a_tiny_bert(how: str) -> None:
    torch.manual_seed(0)
    bert = hf.BertModel(hf.BertConfig(**SMALL, attn_implementation=how)).double().eval()
    ids = torch.randint(1, 64, (2, 14))
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    before, names = bert(ids, mask)[0], list(bert.state_dict())
    hydra = made(2)
    undo = put_encoder_mixers(bert, {-2: hydra})
    got = bert(ids, mask)[0]
    bert.encoder.layer[1].attention.self = _Naive(hydra)
    assert torch.allclose(got[0], bert(ids[:1])[0][0], atol=1e-10)
    assert torch.allclose(got[1, :9], bert(ids[1:, :9])[0][0], atol=1e-10)
    assert not torch.allclose(got, before)
    undo()
    assert torch.equal(bert(ids, mask)[0], before) and list(bert.state_dict()) == names


def test_bad_input() -> None:
    bert, hydra = hf.BertModel(hf.BertConfig(**SMALL)), Hydra(16, head_dim=8)
    for modules, says in (
        ({3: hydra}, "from 0 to 2; got 3"),
        ({0: Hydra(32)}, "hidden_size 16 for BertModel; got a Hydra with 32 for layer 0"),
        ({0: nn.Identity()}, "got a Identity with none"),
        ({0: hydra, 1: hydra}, "one module for two layers"),
    ):
        with pytest.raises(SpecError, match=says):
            put_encoder_mixers(bert, modules)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="an odd conv"):
        Hydra(16, head_dim=8, conv=4)
    undo = put_encoder_mixers(bert, {0: hydra})
    with pytest.raises(FarspanError, match="hides other keys from one query than from another"):
        bert(torch.ones(1, 4, dtype=torch.long), torch.ones(4, 4).tril().bool()[None, None])
    undo()


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(encoder_mixers().keys() - {"hydra"}))
def test_the_others_in_a_tiny_bert(name: str) -> None:
    """A row of a padded batch is the row alone, and undo brings the attention back."""
    torch.manual_seed(0)
    bert = hf.BertModel(hf.BertConfig(**SMALL)).double().eval()
    ids, mask = torch.randint(1, 64, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    before = bert(ids, mask)[0]
    undo = put_encoder_mixers(bert, {1: parse_encoder_mixer(name, 16).double()})
    got = bert(ids, mask)[0]
    assert torch.allclose(got[1, :9], bert(ids[1:, :9])[0][0], atol=1e-10)
    assert not torch.allclose(got, before)
    undo()
    assert torch.equal(bert(ids, mask)[0], before)


def test_causal_models_are_refused_in_one_sentence(tiny_llama: Any) -> None:
    assert "hydra" not in mixers()
    llama, hydra = tiny_llama(), Hydra(128)
    with pytest.raises(
        SpecError, match=r"the encoder mixer hydra, which reads later tokens and cannot stand in a causal LM"
    ) as e:
        farspan.patch(llama, mixers={1: hydra})  # type: ignore[dict-item]
    assert len(re.findall(r"[.!?] [A-Z]", str(e.value))) == 0
    decoder = hf.BertLMHeadModel(hf.BertConfig(**SMALL, is_decoder=True))
    for model in (llama, decoder):
        with pytest.raises(Unsupported, match="it is causal, and encoder mixers read later tokens"):
            put_encoder_mixers(model, {1: hydra})
    with pytest.raises(Unsupported, match="no layers with the self-attention of BERT"):
        put_encoder_mixers(nn.Linear(2, 2), {0: hydra})
