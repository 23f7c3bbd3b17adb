"""`farspan convert`, and what the other commands make of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import farspan


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("It rained in the morning and the river rose. " * 60)
    return str(path)


def test_convert_and_use(farspan_command: Any, tiny_folder: Path, prose: str, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    words = ["convert", "--model", str(tiny_folder), "--mixer", "gated_linear:window=16", "--text", prose]
    words += ["--attention-layers", "auto:1", "--steps-align", "2", "--steps-heal", "2", "--window", "64"]
    code, shown, told = farspan_command(*words, "--held-out", "2", "--out", str(out))
    assert code == 0, told
    report = json.loads((out / "conversion.json").read_text())
    assert report["base"] == "tiny" and f"{report['after']['kl']:.4f}" in shown
    assert "stays" in shown and "replaced" in shown and "1 of 2 layers have gated_linear:window=16" in shown
    assert "KV cache: 256 bytes a token, before 512" in shown and "stage 2: 2 steps" in told
    size = report["memory"]
    assert f"Below {size['break_even_tokens']} tokens" in shown

    model, tokenizer = farspan.load(out)
    assert type(model).__name__ == "FarspanLlamaForCausalLM" and tokenizer.padding_side == "left"
    code, shown, told = farspan_command(
        "generate",
        "--model",
        str(out),
        "--prompt",
        "It rained",
        "--max-new-tokens",
        "3",
        "--method",
        "window:w=8",
    )
    assert code == 0 and "the model's own mixer gated_linear" in shown + told
    code, shown, _ = farspan_command("plan", "--model", str(out), "--length", "4096", "--gpus", "1", "--json")
    plan = json.loads(shown)
    assert code == 0 and plan["memory"]["states"] == size["state_bytes"]
    assert plan["memory"]["kv_cache"] == 4096 * 2 * 2 * 16 * 4
    assert any(f"Below {size['break_even_tokens']} tokens" in note for note in plan["notes"])

    code, _, told = farspan_command(*words, "--out", str(out))
    assert code == 2 and "exists and holds a model" in told


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--mixer", "gated_liner"], "There is no mixer 'gated_liner' (did you mean 'gated_linear'?)"),
        (["--mixer", "gated_linear:window=-1"], "gated_linear takes window >= 0"),
        (["--attention-layers", "auto:9"], "must name a number from 1 to 1"),
        (["--attention-layers", "0,5"], "attention_layers names '5'"),
        (["--window", "2048"], "The text has"),
    ],
)
def test_bad_commands(
    given: list[str], says: str, farspan_command: Any, tiny_folder: Path, prose: str, tmp_path: Path
) -> None:
    words = {
        "--model": str(tiny_folder),
        "--mixer": "gated_linear",
        "--text": prose,
        "--out": str(tmp_path / "o"),
    }
    words |= {"--attention-layers": "auto:1", **dict(zip(given[::2], given[1::2], strict=True))}
    code, _, told = farspan_command("convert", *(x for pair in words.items() for x in pair))
    assert code == 2 and says in told and told.count("\n") == 1 and not (tmp_path / "o").exists()
