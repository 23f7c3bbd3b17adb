"""Offline calibration: rank each KV head's channels on text the user names (Double Sparsity, 2408.07092)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..attention.errors import FarspanError
from . import hf
from .patch import patch
from .recipe import Recipe

RANKINGS = ("q", "k", "qk")


def calibrate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    method: str = "double_sparsity",
    by: str = "qk",
    tokens: int = 4096,
    window: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Recipe:
    """Rank the channels of every layer's KV heads on the first ``tokens`` tokens of ``text``.

    by: "q" or "k" ranks a channel by its mean magnitude before RoPE; "qk" by the mean of |q_c k_c| over pairs
    of a query and a key after RoPE, which is the product of the two mean magnitudes. Query heads of a group
    count together. The text is read in windows of ``window`` tokens. ``progress(done, total)`` is called
    after each.

    Returns a Recipe with ``layers.<i>.channels`` [Hkv, D] int32, best first. Raises FarspanError for an
    unknown ranking or a text that is too short to rank on (under 64 tokens).
    """
    if method != "double_sparsity":
        raise FarspanError(f"Only double_sparsity is calibrated; got {method!r}.")
    if by not in RANKINGS:
        raise FarspanError(f"Channels are ranked by {', '.join(RANKINGS)}; got {by!r}.")
    if tokens < 64 or window < 64:
        raise FarspanError(
            f"Calibration needs at least 64 tokens in a window; got tokens={tokens}, window={window}."
        )
    info = hf.inspect_model(model)
    if info.weights_mesh is not None:
        raise FarspanError(
            "A model is calibrated before its heads are shared out by tensor parallelism: calibrate it "
            "whole, and give all ranks the recipe."
        )
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    if ids.shape[1] < 64:
        raise FarspanError(f"The calibration text has {ids.shape[1]} tokens; at least 64 are needed.")
    means = {i: _Means() for i in info.attention}
    total = ids.shape[1]
    with patch(model, "dense"), torch.no_grad(), _observed(info, means, before_rope=by != "qk"):
        for a in range(0, total, window):
            piece = ids[:, a : a + window].to(model.device)
            model(piece, use_cache=False, logits_to_keep=1)
            if progress is not None:
                progress(min(a + window, total), total)
    tensors = {
        f"layers.{i}.channels": m.score(by, info.layer_info(i).num_kv_heads)
        .argsort(dim=-1, descending=True, stable=True)
        .int()
        for i, m in means.items()
    }
    settings = {"by": by, "tokens": total, "window": window, "torch": torch.__version__}
    return Recipe(method=method, geometry=info.geometry, settings=settings, tensors=tensors)


class _Means:
    """Running sums of |q| and |k| per head and channel."""

    def __init__(self) -> None:
        self.q: Tensor | float = 0.0  # [H, D]
        self.k: Tensor | float = 0.0  # [Hkv, D]

    def add(self, q: Tensor, k: Tensor) -> None:
        self.q = self.q + q.double().abs().sum((0, 2)).cpu()
        self.k = self.k + k.double().abs().sum((0, 2)).cpu()

    def score(self, by: str, num_kv_heads: int) -> Tensor:
        assert isinstance(self.q, Tensor) and isinstance(self.k, Tensor)
        q = self.q.unflatten(0, (num_kv_heads, -1)).mean(1)  # [Hkv, D]
        return {"q": q, "k": self.k, "qk": q * self.k}[by]


@contextmanager
def _observed(info: hf.ModelInfo, means: dict[int, _Means], *, before_rope: bool) -> Iterator[None]:
    """Feed the q and k of every attention call to ``means``."""
    undo = [hf.observe(module, before_rope, means[i].add) for i, module in info.attention.items()]
    try:
        yield
    finally:
        for step in undo:
            step()
