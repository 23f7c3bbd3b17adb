"""What a model and a tokenizer are, by content: values and hashes to compare them by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.digest import weights_digest

_NAMES = ("transformers_version", "dtype", "torch_dtype", "architectures")
"""Fields of a configuration that are compared elsewhere, or that saving a model fills in."""
_PROBE = "Zwei 2026, naïve: 你好!\n\tdef f(x):\n\t\treturn x ** 2  # привет"
_SAMPLE = 4096  # numbers of a tensor that a cheap digest reads


def hash_of(value: Any) -> str:
    """The first 16 hex digits of a hash of plain values."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain_config(value: Any) -> Any:
    """A configuration without its names and loading options. 2.0 becomes 2, as some files spell it."""
    if isinstance(value, dict):
        kept = {str(name): item for name, item in value.items()}
        return {n: plain_config(x) for n, x in kept.items() if n not in _NAMES and not n.startswith("_")}
    if isinstance(value, (list, tuple)):
        return [plain_config(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What decides the tokens of a text: vocabulary and rules, as far as the tokenizer shows them, and the
    tokens of a sample text that needs many rules."""
    facts: dict[str, Any] = {"probe": list(tokenizer(_PROBE, verbose=False).input_ids)}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(backend.to_str())
        facts["rules"] = {n: rule for n, rule in rules.items() if n not in ("padding", "truncation")}
    elif hasattr(tokenizer, "get_vocab"):
        facts["vocabulary"] = tokenizer.get_vocab()
    return facts


def sampled_digest(model: nn.Module) -> str:
    """A hash of every parameter's name, shape and dtype, and of up to 4,096 of its numbers, evenly spread.
    Weights that are offloaded count without numbers."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for part in plain_tensors(parameter.detach()):
            step = max(1, part.numel() // _SAMPLE)
            some = torch.empty(0) if part.is_meta else part.flatten()[::step]
            found[f"{name} {len(found)} {list(part.shape)} {part.dtype}"] = some
    return weights_digest(found)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors behind a tensor: the full tensor of a sharded one, the parts of a quantised one."""
    if hasattr(tensor, "full_tensor"):
        yield tensor.full_tensor()
    elif hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor
