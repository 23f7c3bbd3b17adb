"""Training of gates: the loop against steps by hand in float64, stops and resumes, and bad input."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import farspan
from farspan import FarspanError, Recipe
from farspan.runtime.training import checkpoint
from farspan.runtime.training.windows import cut_windows

from .pooled_gate import BLOCK, PooledGate
from .small_models import VOCAB, make, snapshot

WINDOW, TOKENS = 64, 64 * 9
GATE = PooledGate(trained=True)


def tokenizer(text: str, **_: Any) -> dict[str, Tensor]:
    """One token a character."""
    return {"input_ids": torch.tensor([[3 + ord(c) % (VOCAB - 3) for c in text]])}


def text(length: int = TOKENS) -> str:
    made = torch.Generator().manual_seed(5)
    return "".join(chr(65 + int(c)) for c in torch.randint(60, (length,), generator=made))


def train(model: Any, out: Path, *, method: Any = GATE, prose: str | None = None, **how: Any) -> Recipe:
    given = {"steps": 6, "window": WINDOW, "held_out": 2, "save_every": 2, "lr": 0.02, **how}
    return farspan.train(model, tokenizer, method, text() if prose is None else prose, out=out, **given)


def naive_loss(model: Any, gates: list[tuple[Tensor, Tensor]], ids: Tensor) -> Tensor:
    """The sum over layers of the mean KL of a window, from the model's own projections, in float64."""
    states = model(ids[None], output_hidden_states=True).hidden_states
    total = torch.zeros((), dtype=torch.float64)
    for layer, hidden, (gate_q, gate_k) in zip(model.model.layers, states, gates, strict=False):
        x = layer.input_layernorm(hidden)[0]
        q, k = (
            p(x).double().view(len(ids), -1, 16).transpose(0, 1)
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        k = k.repeat_interleave(len(q) // len(k), 0)
        turned = [rotated(one, model.config.rope_parameters["rope_theta"]) for one in (q, k)]
        seen = torch.ones(len(ids), len(ids)).tril().bool()
        logits = (turned[0] @ turned[1].transpose(1, 2) * layer.self_attn.scaling).masked_fill(~seen, -1e30)
        n = len(ids) // BLOCK
        truth = logits.softmax(-1).view(-1, n, BLOCK, n, BLOCK).amax((2, 4))
        truth = truth / truth.sum(-1, keepdim=True)
        pooled = [one.view(len(one), n, BLOCK, 16).mean(2) for one in (q, k)]
        found = (pooled[0] @ gate_q.T) @ (pooled[1] @ gate_k.T).transpose(1, 2)
        log_gate = found.masked_fill(~torch.ones(n, n).tril().bool(), -1e30).log_softmax(-1)
        total = total + (truth * (truth.clamp(min=1e-300).log() - log_gate)).sum(-1).mean()
    return total


def rotated(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def test_steps_are_those_of_adamw_by_hand(tmp_path: Path) -> None:
    model = make("llama").double()
    made = train(model, tmp_path, steps=3, batch=2, warmup=0)
    windows = cut_windows(tokenizer, text(), WINDOW, 2)
    gates = [
        tuple(x.detach().double().requires_grad_() for x in GATE.for_training(layer).module.parameters())
        for layer in map(farspan.runtime.hf.inspect_model(model).layer_info, range(3))
    ]
    optimizer = torch.optim.AdamW([x for pair in gates for x in pair], lr=0.02, weight_decay=0.0)
    for step, factor in enumerate((1.0, 0.75, 0.25)):  # a cosine
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * factor
        optimizer.zero_grad()
        for ids in windows.of_step(step, 2, 0):
            (naive_loss(model, gates, ids) / 2).backward()
        torch.nn.utils.clip_grad_norm_([x for pair in gates for x in pair], 1.0)
        optimizer.step()
    for index, pair in enumerate(gates):
        for name, x in zip("qk", pair, strict=True):
            assert torch.allclose(made.tensors[f"layers.{index}.{name}"].double(), x, atol=2e-6)


def test_training_lowers_the_held_out_loss_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = make("qwen3").train()
    before = snapshot(model)
    made = train(model, tmp_path, steps=20)
    assert snapshot(model) == before and model.training
    first, last = (measure["loss"] for measure in made.settings["held_out"])
    assert last < 0.9 * first
    saved = Recipe.load(tmp_path)
    assert saved.settings["text_sha256"] and saved.parameters == {"block": BLOCK}
    with farspan.patch(model.eval(), GATE, recipe=tmp_path) as patched:
        model(torch.arange(40)[None] + 3)
        gates = patched.modules()
    assert all(torch.equal(gates[i][GATE.name].q, made.tensors[f"layers.{i}.q"]) for i in gates)
    with pytest.raises(FarspanError, match="block=8' and the spec has block=4: change the spec"):
        farspan.patch(model, PooledGate(trained=True, block=4), recipe=tmp_path)


def test_what_a_window_shows_is_kept_for_later_steps(tmp_path: Path, monkeypatch: Any) -> None:
    """The model runs once for each window that is trained on, and the weights are those without that."""
    observed, own = [], PooledGate.observed

    def counted(self: Any, q: Tensor, keys: Any) -> Any:
        observed.append(1)
        return own(self, q, keys)

    monkeypatch.setattr(PooledGate, "observed", counted)
    kept = train(make("llama"), tmp_path / "kept", steps=9, windows=3, batch=2, held_out=1)
    assert len(observed) == 3 * (3 + 1 + 1)  # layers; windows, and the one held out before and after
    anew = train(make("llama"), tmp_path / "anew", steps=9, windows=3, batch=2, held_out=1, keep=1)
    assert len(observed) == 3 * (5 + 9 * 2 + 2)
    assert all(torch.equal(x, anew.tensors[name]) for name, x in kept.tensors.items())


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_stopped_training_ends_at_the_same_weights(tmp_path: Path, at: int) -> None:
    whole = train(make("llama"), tmp_path / "whole")

    def stop(step: Any) -> None:
        if step.done == at:
            raise Stop

    with pytest.raises(Stop):
        train(make("llama"), tmp_path / "cut", progress=stop)
    seen: list[int] = []
    again = train(make("llama"), tmp_path / "cut", progress=lambda step: seen.append(step.done))
    assert seen == list(range(at // 2 * 2 - (at % 2 == 0) * 2 + 1, 7))  # a step is saved after its progress
    assert whole.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(x, again.tensors[name]) for name, x in whole.tensors.items())
    assert whole.settings["held_out"] == again.settings["held_out"]


def test_a_finished_training_is_not_run_again(tmp_path: Path) -> None:
    first = train(make("llama"), tmp_path)
    seen: list[int] = []
    again = train(make("llama"), tmp_path, progress=lambda step: seen.append(step.done))
    assert not seen and all(torch.equal(x, again.tensors[name]) for name, x in first.tensors.items())


def test_training_goes_on_from_a_recipe(tmp_path: Path) -> None:
    made = train(make("llama"), tmp_path / "a", steps=20)
    more = train(make("llama"), tmp_path / "b", steps=1, lr=1e-9, start=tmp_path / "a")
    assert all(torch.allclose(x, more.tensors[name], atol=1e-7) for name, x in made.tensors.items())
    assert more.settings["held_out"][0]["loss"] == pytest.approx(made.settings["held_out"][-1]["loss"])


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[int] = []
    own = PooledGate.distillation_loss

    def spoilt(self: Any, q: Tensor, keys: Any) -> Tensor:
        calls.append(1)
        spoil = torch.is_grad_enabled() and len(calls) > 3 * (2 + 3)  # 3 layers, 2 held out, 3 steps
        return own(self, q, keys) * (torch.nan if spoil else 1.0)

    monkeypatch.setattr(PooledGate, "distillation_loss", spoilt)
    with pytest.raises(
        FarspanError, match=r"loss of step 4 is nan, so training stopped; the checkpoint in .* is kept"
    ):
        train(make("llama"), tmp_path)
    assert checkpoint.load_checkpoint(tmp_path, saved_settings(tmp_path))["step"] == 2  # type: ignore[index]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_a_gradient_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    own, calls = PooledGate.loss_of, []

    def spoilt(self: Any, observed: Any) -> Tensor:
        loss = own(self, observed)
        calls.append(1)
        if loss.requires_grad and len(calls) > 3 * (2 + 3):
            loss.register_hook(lambda grad: grad * torch.nan)
        return loss

    monkeypatch.setattr(PooledGate, "loss_of", spoilt)
    with pytest.raises(
        FarspanError, match=r"gradient of step 4 is not finite, .* the checkpoint in .* is kept"
    ):
        train(make("llama"), tmp_path)
    kept = checkpoint.load_checkpoint(tmp_path, saved_settings(tmp_path))
    assert kept is not None and kept["step"] == 2 and all(x.isfinite().all() for x in kept["state"].values())


def saved_settings(out: Path) -> dict[str, Any]:
    return torch.load(out / checkpoint.FILE, weights_only=True)["settings"]


def test_a_full_disk_keeps_the_recipe_before(tmp_path: Path, monkeypatch: Any) -> None:
    first = train(make("llama"), tmp_path)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"the beginning of it")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(FarspanError, match=r"recipe could not be written to .*No space left"):
        first.save(tmp_path)
    assert Recipe.load(tmp_path).digest == first.digest
    assert not list(tmp_path.glob("*.new"))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: Any) -> None:
    save, calls = torch.save, []

    def full(content: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            file.write(b"the beginning of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        FarspanError, match=r"step 4 could not be written .*No space left.*; the checkpoint before it is kept"
    ):
        train(make("llama"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    assert all(torch.equal(x, y) for x, y in zip(*resumed_and_whole(tmp_path), strict=True))


def resumed_and_whole(out: Path) -> tuple[list[Tensor], list[Tensor]]:
    again, whole = train(make("llama"), out), train(make("llama"), out / "whole")
    return list(again.tensors.values()), list(whole.tensors.values())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"prose": "short"}, "has 5 tokens, which are 0 windows of 64; .* 3 at least"),
        ({"window": 32}, "windows of at least 64 tokens; got 32"),
        ({"window": 1024}, "1024 tokens is longer than the model's 512 positions"),
        ({"method": "block_topk"}, "block_topk has no gate that learns by distillation: give tune='lora'"),
        ({"method": "nonsense"}, "nonsense"),
        ({"method": "chunkllm:boundary_layer=9"}, "boundary_layer is at most 2 .*; got 9"),
        ({"tune": "all"}, "tune is 'lora' or 'attention', or left out for gates; got 'all'"),
        ({"rank": 4}, "rank belongs to tune='lora' or 'attention'"),
        ({"steps": 0}, "steps is at least 1; got 0"),
        ({"lr": -1.0}, "lr is a finite number above 0; got -1.0"),
        ({"precision": "int8"}, "precision is no, bf16 or fp16; got 'int8'"),
        ({"held_out": 0}, "At least 1 window must be held out"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path: Path, how: dict[str, Any], says: str) -> None:
    model = make("llama")
    before = snapshot(model)
    with pytest.raises(FarspanError, match=says):
        train(model, tmp_path / "out", **how)
    assert snapshot(model) == before and not (tmp_path / "out").exists()


def test_the_log_of_a_killed_training_is_cut_to_its_checkpoint(tmp_path: Path) -> None:
    train(make("llama"), tmp_path / "whole")

    def stop(step: Any) -> None:
        if step.done == 4:
            raise Stop

    with pytest.raises(Stop):
        train(make("llama"), tmp_path, progress=stop)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(make("llama"), tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("count", "held_out", "most"), [(5, 4, None), (3, 2, None), (12, 1, 7), (9, 3, 3)])
def test_no_window_comes_twice(count: int, held_out: int, most: int | None) -> None:
    windows = cut_windows(tokenizer, text(64 * count), 64, held_out, most)
    assert len(windows.held_out) == held_out and len(windows.train) == min(most or count, count - held_out)
    both = torch.cat([windows.train, windows.held_out])
    assert len(both.unique(dim=0)) == len(both)


def test_every_window_begins_as_the_tokenizer_begins_a_text(monkeypatch: Any) -> None:
    def with_bos(prose: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.cat([torch.tensor([[1]]), tokenizer(prose)["input_ids"]], 1)}

    with_bos.bos_token_id = 1  # type: ignore[attr-defined]
    windows = cut_windows(with_bos, text(63 * 5), 64, 2)
    both = torch.cat([windows.train, windows.held_out])
    assert both.shape == (5, 64) and (both[:, 0] == 1).all() and (both[:, 1:] != 1).all()


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    train(make("llama"), tmp_path, steps=2)
    for model in (make("llama", seed=1), make("llama", num_hidden_layers=2)):
        with pytest.raises(FarspanError, match="holds a training with other settings: model="):
            train(model, tmp_path, steps=2)
    other = train(make("llama"), tmp_path / "other", steps=2, seed=3)
    with pytest.raises(FarspanError, match="holds a training with other settings: start=None"):
        train(make("llama"), tmp_path, steps=2, start=other)
    with pytest.raises(FarspanError, match=r"other settings: steps=2 \(now 3\), seed=0 \(now 1\)"):
        train(make("llama"), tmp_path, steps=3, seed=1)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(FarspanError, match="cannot be read"):
        train(make("llama"), tmp_path, steps=2)
