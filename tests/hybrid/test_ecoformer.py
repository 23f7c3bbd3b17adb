"""EcoFormer against the shares of equal bits of every pair of tokens in float64."""

from __future__ import annotations

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import parse_mixer

from .tools import GEOMETRY, close, make, random


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "bits", "anchors"), [("ecoformer", 16, 20), ("ecoformer:bits=1,anchors=5", 1, 5)]
)
def test_the_shares_of_equal_bits(spec: str, bits: int, anchors: int) -> None:
    mixer, x = make(spec), random(19, 32)
    w = mixer.state_dict()

    def code(y: torch.Tensor, head: int) -> list[bool]:
        near = torch.stack([(-(y - w["anchors"][head, a]).square().sum() / 8).exp() for a in range(anchors)])
        return (near @ w["hash"][head] + w["offset"][head, 0] >= 0).tolist()

    heads, bare = [], 0
    for h in range(4):
        kv = h // 2
        q = x @ w["q_proj.weight"][8 * h : 8 * h + 8].T
        k = x @ w["k_proj.weight"][8 * kv : 8 * kv + 8].T
        v = x @ w["v_proj.weight"][8 * kv : 8 * kv + 8].T
        outs = []
        for t in range(19):
            asked = code(q[t], kv)
            shares = [sum(a == b for a, b in zip(asked, code(k[j], kv), strict=True)) for j in range(t + 1)]
            weights = torch.tensor(shares).double()
            bare += sum(shares) == 0
            outs.append(weights @ v[: t + 1] / max(1, sum(shares)))
        heads.append(torch.stack(outs))
    assert close(mixer(x[None])[0][0], torch.cat(heads, 1) @ w["o_proj.weight"].T)
    assert bits == 16 or bare > 0  # a query without an equal bit has been met


def test_bad_parameters() -> None:
    with pytest.raises(SpecError, match="bits and anchors of at least 1"):
        parse_mixer("ecoformer:bits=0", GEOMETRY)
