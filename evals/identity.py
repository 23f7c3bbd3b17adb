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
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..parallel.group.digest import bit_hash
from ..runtime.identity import hash_of, plain_config, plain_tensors, tokenizer_facts
from . import batch as forward
from .private_apis import has_accelerate_hook, is_saved


def identify(model: Any, tokenizer: Any) -> dict[str, str | None]:
    """Hashes of the model's `config` (end tokens included), `weights`, `tokenizer` and `chat_template`.

    chat_template is None where the tokenizer has none. Over ranks every rank calls this, because weights that
    are sharded by tensor parallelism are gathered.
    """
    template = getattr(tokenizer, "chat_template", None)
    ends = forward.end_tokens(model, tokenizer)
    return {
        "config": hash_of({"config": plain_config(model.config.to_dict()), "end_tokens": ends}),
        "weights": _weights(model),
        "tokenizer": hash_of(tokenizer_facts(tokenizer)),
        "chat_template": None if template is None else hash_of(template),
    }


def _weights(model: nn.Module) -> str:
    """A hash of every parameter and saved buffer: name, shape, dtype and bits."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        with _present(module):
            for name, tensor in _own_tensors(module):
                for part in plain_tensors(tensor):
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
