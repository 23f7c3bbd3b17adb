"""Which model an evaluation measures: by content, not by the path or the name that it was loaded from.

The identity is computed from the loaded model. So a hub id, an alias, a GGUF file and a folder with the same
content are one model, and the next checkpoint at the same path is another one. All weights are hashed, not a
sample, because two checkpoints of one training may differ in few of their bfloat16 numbers. That takes about
2 s for 1 GB on one core of a CPU.

Code is not part of the identity. A model class that computes something else with the same configuration and
weights, such as another version of a remote `modeling_*.py`, counts as the same model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..parallel.group.digest import bit_hash
from . import batch as forward
from .private_apis import has_accelerate_hook, is_saved

_NAMES = ("transformers_version", "dtype", "torch_dtype", "architectures")
"""Fields of a configuration that are compared elsewhere, or that saving a model fills in."""
_PROBE = "Zwei 2026, naïve: 你好!\n\tdef f(x):\n\t\treturn x ** 2  # привет"


def identify(model: Any, tokenizer: Any) -> dict[str, str | None]:
    """Hashes of the model's `config` (end tokens included), `weights`, `tokenizer` and `chat_template`.

    chat_template is None where the tokenizer has none. Over ranks every rank calls this, because weights that
    are sharded by tensor parallelism are gathered.
    """
    template = getattr(tokenizer, "chat_template", None)
    ends = forward.end_tokens(model, tokenizer)
    return {
        "config": _hash({"config": _plain(model.config.to_dict()), "end_tokens": ends}),
        "weights": _weights(model),
        "tokenizer": _hash(_tokenizer(tokenizer)),
        "chat_template": None if template is None else _hash(template),
    }


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A configuration without its names and loading options. 2.0 becomes 2, as some files spell it."""
    if isinstance(value, dict):
        kept = {str(name): item for name, item in value.items()}
        return {n: _plain(x) for n, x in kept.items() if n not in _NAMES and not n.startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What decides the tokens of a text: vocabulary and rules, as far as the tokenizer shows them, and the
    tokens of a sample text that needs many rules."""
    facts: dict[str, Any] = {"probe": list(tokenizer(_PROBE, verbose=False).input_ids)}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(backend.to_str())
        facts["rules"] = {n: rule for n, rule in rules.items() if n not in ("padding", "truncation")}
    elif hasattr(tokenizer, "get_vocab"):
        facts["vocabulary"] = tokenizer.get_vocab()
    return facts


def _weights(model: nn.Module) -> str:
    """A hash of every parameter and saved buffer: name, shape, dtype and bits."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        with _present(module):
            for name, tensor in _own_tensors(module):
                for part in _whole(tensor):
                    line = f"{path}.{name} {tuple(part.shape)} {part.dtype} {int(bit_hash(part))}\n"
                    digest.update(line.encode())
    return digest.hexdigest()[:16]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if is_saved(module, name):
            yield name, buffer


def _present(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which weights that accelerate keeps elsewhere (CPU memory, a disk) are loaded."""
    if not has_accelerate_hook(module):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _whole(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors behind a tensor: the full tensor of a sharded one, the parts of a quantised one."""
    if hasattr(tensor, "full_tensor"):
        yield tensor.full_tensor()
    elif hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _whole(getattr(tensor, name))
    else:
        yield tensor
