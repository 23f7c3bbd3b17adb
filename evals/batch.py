"""A batch of prompts through a (patched) model: prefill, greedy answer, teacher-forced likelihood.

The last prompt token is not part of the prefill here: it is the first decode step. So a decode method
selects from the first token of the answer on, and all decode methods can start from copies of one dense
prefill.

Shapes: B rows, T the longest prompt of the batch (shorter ones are padded on the left).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.hf import fill, generate_by, generation_settings, greedy_config, with_cache

END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|return|>")
"""Tokens by which chat templates close an assistant's turn. Some models do not list theirs as EOS."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Left-padded prompts: ids and mask [B, T] (mask 1 = a token of the prompt), the length of each row
    [B]."""

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor


class Clock:
    """The seconds of a `with` block. The device's queue is drained at both ends."""

    seconds: float = 0.0


@contextmanager
def timed(device: torch.device) -> Iterator[Clock]:
    clock = Clock()
    _drain(device)
    start = time.perf_counter()
    yield clock
    _drain(device)
    clock.seconds = time.perf_counter() - start


def collate(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> Batch:
    """Pad prompts on the left to one batch. Raises ValueError for a prompt of fewer than two tokens."""
    if min(len(prompt) for prompt in prompts) < 2:
        raise ValueError(
            "a prompt has fewer than 2 tokens; all but the last are prefilled, and the last is decoded."
        )
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    return Batch(ids=ids, mask=mask, lengths=lengths)


def prefill(model: Any, batch: Batch) -> Any:
    """The cache after all prompt tokens but the last, from a plain call with `use_cache=True`."""
    return fill(model, batch.ids[:, :-1], batch.mask[:, :-1])


def teacher_forced(
    model: Any, batch: Batch, cache: Any, golds: Sequence[Sequence[int]], *, pad: int, per_call: int = 1
) -> list[list[float]]:
    """Negative log-likelihood (nats) of each gold token after its prompt, fed through the decode path.

    Arguments as for `forced_logits`. The losses of padded golds are left out.
    """
    losses = []
    for logits, targets in forced_logits(model, batch, cache, golds, pad=pad, per_call=per_call):
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        losses.append(loss.view(targets.shape).cpu())
    table = torch.cat(losses, dim=1).tolist() if losses else [[] for _ in golds]
    return [row[: len(gold)] for row, gold in zip(table, golds, strict=True)]


@torch.no_grad()
def forced_logits(
    model: Any, batch: Batch, cache: Any, golds: Sequence[Sequence[int]], *, pad: int, per_call: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the logits [B, n, V] that come before n gold tokens each, and these tokens [B, n].

    cache: from `prefill`; this call changes it. The inputs are the last prompt token and all gold tokens but
    the last, `per_call` of them in each call (`generate` has 1; up to 16 count as decode). Shorter golds are
    padded on the right. The padding cannot influence earlier tokens.
    """
    steps = max(len(gold) for gold in golds)
    device, rows = batch.ids.device, len(golds)
    targets = torch.tensor([list(gold) + [pad] * (steps - len(gold)) for gold in golds], device=device)
    inputs = torch.cat([batch.ids[:, -1:], targets[:, :-1]], dim=1) if steps else targets  # [B, steps]
    mask = torch.cat([batch.mask, batch.mask.new_ones(rows, steps)], dim=1)
    positions = batch.lengths[:, None] - 1 + torch.arange(steps, device=device)
    prompt = batch.ids.shape[1] - 1
    for start in range(0, steps, per_call):
        stop = min(start + per_call, steps)
        logits = model(
            input_ids=inputs[:, start:stop],
            attention_mask=mask[:, : prompt + stop],
            position_ids=positions[:, start:stop],
            use_cache=True,
            **with_cache(model, cache),
        ).logits
        yield logits, targets[:, start:stop]


@torch.no_grad()
def greedy(
    model: Any,
    batch: Batch,
    cache: Any,
    *,
    max_new_tokens: int,
    pad: int,
    eos: Sequence[int],
) -> list[list[int]]:
    """Greedy continuations by a plain `model.generate`, each row up to and without its first end token.

    cache: from `prefill`; this call changes it. eos: the end tokens; without any, every row has
    `max_new_tokens` tokens. The model's generation config is ignored.
    """
    config = greedy_config(max_new_tokens=max_new_tokens, pad=pad, eos=eos)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, **with_cache(model, cache)}
    rows = generate_by(model, config, **inputs)[:, batch.ids.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in eos), len(row))] for row in rows]


def set_aside(model: Any) -> dict[str, Any]:
    """An entry for a session in config.json: the settings of the model's generation config that `greedy`
    ignores. Empty where there are none."""
    settings = generation_settings(model)
    return {"generation_config_set_aside": settings} if settings else {}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's and the tokenizer's EOS, and the end of an assistant's turn.

    Nothing else stops an answer. RULER counts references anywhere in it, so a newline or a first match may
    not end it. A base model that never generates EOS goes on to the task's `max_new_tokens`, as published.
    """
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(found) if isinstance(found, (list, tuple)) else [found]
    ids.append(getattr(tokenizer, "eos_token_id", None))
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    ids += [tokenizer.convert_tokens_to_ids(token) for token in END_OF_TURN if token in special]
    return sorted({int(token) for token in ids if token is not None})


def pad_token(model: Any, tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's, else an end token, else 0. Padding is masked, whatever its id.

    Ids without an embedding in the model are skipped, because padding is embedded like any token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = [getattr(tokenizer, "pad_token_id", None), *end_tokens(model, tokenizer)]
    return next((int(token) for token in wanted if token is not None and 0 <= token < rows), 0)


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
