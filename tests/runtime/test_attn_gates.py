"""SeerAttention's published gates become recipes: files of their layouts, made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan import FarspanError
from farspan.runtime import hf
from farspan.runtime.attn_gates import convert_attn_gates

H, HKV, D, LAYERS = 8, 2, 16, 2  # of tiny_llama
IDS = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))
PREFILL = {"mask_linear_k": (H, 3 * D, D)}
DECODE = {
    "attngate_linear_q": (HKV, H // HKV, D, D),
    "attngate_linear_k": (HKV, 3 * D, D),
    "attngate_qnorm": (D,),
    "attngate_knorm": (D,),
}
CONFIG = {"seerattn_gate_block_size": 8, "seerattn_gate_type": "Qavg_Kmaxminavg", "base_model": "org/tiny"}


def weights(parts: dict[str, tuple[int, ...]], layers: int = LAYERS) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{i}.self_attn.attn_gate.{part}.weight": torch.randn(shape, generator=made).bfloat16()
        for i in range(layers)
        for part, shape in parts.items()
    }


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Path]:
    def make(parts: dict[str, tuple[int, ...]], layers: int = LAYERS, **config: Any) -> Path:
        torch.save(weights(parts, layers), tmp_path / "attn_gate_weights.pth")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
        return tmp_path

    return make


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(initializer_range=0.15, num_hidden_layers=LAYERS)


def test_prefill_gates(model: Any, published: Callable[..., Path], tmp_path: Path) -> None:
    folder = published(PREFILL)
    recipe = convert_attn_gates(folder, model)
    assert recipe.method == "seer" and recipe.parameters == {"block": 8}
    given = weights(PREFILL)["model.layers.1.self_attn.attn_gate.mask_linear_k.weight"]
    assert torch.equal(recipe.tensors["layers.1.k"], given.float())
    saved = recipe.save(tmp_path / "recipe")
    with farspan.patch(model, "seer:block=8,fraction=0.3", recipe=saved) as patched, torch.no_grad():
        model(IDS, use_cache=False)
        assert 0 < patched.report().summary["prefill_density"] < 0.6
        gate = patched.modules()[1]["seer"]
        assert gate.q is None and torch.equal(gate.k, given.float())


def test_prefill_gates_with_a_projection_of_queries(model: Any, published: Callable[..., Path]) -> None:
    folder = published({"mask_linear_q": (H, D, 6), "mask_linear_k": (HKV, 3 * D, 6)})
    recipe = convert_attn_gates(folder, model)
    assert recipe.tensors["layers.0.q"].shape == (H, D, 6)


def test_decode_gates(model: Any, published: Callable[..., Path], tmp_path: Path) -> None:
    config = {"seerattn_q_head_pooling_type": "Qproj", "seerattn_k_seq_pooling_type": "Kmaxminavg"}
    recipe = convert_attn_gates(published(DECODE, **config) / "attn_gate_weights.pth", model)
    assert recipe.method == "seer_decode" and recipe.parameters == {"block": 8}
    given = weights(DECODE)["model.layers.0.self_attn.attn_gate.attngate_linear_q.weight"].float()
    q = recipe.tensors["layers.0.q"]
    for g in range(H // HKV):
        assert torch.equal(q[:, g * D : (g + 1) * D], given[:, g])
    with farspan.patch(model, "seer_decode:block=8,k=24", recipe=recipe.save(tmp_path / "r")) as patched:
        model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert 0 < patched.report().summary["decode_density"] < 0.5


def test_safetensors_alone_are_of_blocks_of_64(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights(PREFILL), tmp_path / "gates.safetensors")
    assert convert_attn_gates(tmp_path / "gates.safetensors", model).parameters == {"block": 64}


def test_the_command(tiny_folder: Path, published: Callable[..., Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from farspan.cli.app import app

    causal_lm, _ = farspan.load(str(tiny_folder))
    info = hf.inspect_model(causal_lm).layer_info(0)
    layers = causal_lm.config.num_hidden_layers
    folder = published({"mask_linear_k": (info.num_heads, 3 * info.head_dim, info.head_dim)}, layers)
    out = tmp_path / "recipe"
    call = ["import-gates", str(folder), "--model", str(tiny_folder), "--out", str(out)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert farspan.Recipe.load(out).method == "seer"


REFUSED: list[tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = [
    (
        {"mask_linear_k": (H, 2 * D, D)},
        {},
        "k of the sizes [8, 32, 16] in layer 0, the model needs [8, 48, 16]",
    ),
    ({"mask_linear_k": (HKV, 3 * D, D)}, {}, "k of the sizes [2, 48, 16]"),
    (PREFILL, {"layers": 1}, "layers up to 0, the model's last layer is 1"),
    (PREFILL, {"layers": 3}, "layers up to 2, the model's last layer is 1"),
    (PREFILL, {"seerattn_gate_type": "Qavg_Kmaxmin"}, "seerattn_gate_type=Qavg_Kmaxmin; farspan reads Qavg"),
    ({"other": (D,)}, {}, "have other; farspan reads those with mask_linear_q, mask_linear_k or attngate"),
    ({name: DECODE[name] for name in list(DECODE)[:2]}, {}, "have attngate_linear_k, attngate_linear_q; far"),
]


@pytest.mark.parametrize("parts, how, says", REFUSED, ids=[says[:30] for *_, says in REFUSED])
def test_other_gates_are_refused(
    model: Any,
    published: Callable[..., Path],
    parts: dict[str, tuple[int, ...]],
    how: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises(FarspanError) as error:
        convert_attn_gates(published(parts, **how), model)
    assert says in str(error.value)


def test_files_that_hold_no_gates_are_refused(model: Any, tmp_path: Path) -> None:
    def refused(says: str, path: Path) -> None:
        with pytest.raises(FarspanError) as error:
            convert_attn_gates(path, model)
        assert says in str(error.value) and "\n" not in str(error.value)

    refused("There are no gates at", tmp_path)
    refused("There are no gates at", tmp_path / "nowhere")
    file = tmp_path / "attn_gate_weights.pth"
    file.write_bytes(b"not weights")
    refused("cannot be read", file)
    torch.save({"model.embed.weight": torch.ones(2)}, file)
    refused("has no tensor 'layers.<i>.self_attn.attn_gate", tmp_path)
    torch.save(weights(PREFILL), file)
    (tmp_path / "config.json").write_text("{")
    refused("config.json cannot be read", tmp_path)
