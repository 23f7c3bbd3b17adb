"""Tensor parallelism: which share of each layer's heads this rank has, and which ranks have the others.

transformers and torch lay such weights out as DTensors; the dimension of their mesh is called "tp".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...attention.errors import FarspanError, Unsupported
from .interface import ATTRIBUTE, NAME, register
from .transformers_private import attention_of, set_attention

TENSOR = "tp"


def weights_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh over which the model's weights are shared out by tensor parallelism; None where they are not.

    Raises Unsupported where it cannot be told which dimension of it is the tensor-parallel one.
    """
    if not any(hasattr(p, "placements") for p in model.parameters()):
        return None
    from torch.distributed.fsdp import FSDPModule

    managed = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in managed:
        module.reshard()  # weights it has gathered and kept no longer know of its own dimensions
    parameters: list[Any] = [p for p in model.parameters() if hasattr(p, "placements")]
    named = [p.device_mesh for p in parameters if TENSOR in (p.device_mesh.mesh_dim_names or ())]
    if named:
        return max(named, key=lambda mesh: mesh.ndim)
    if managed and all(sum(not x.is_replicate() for x in p.placements) <= 1 for p in parameters):
        return None  # FSDP gives every module its whole weights while it runs
    raise Unsupported(
        f"farspan cannot patch {type(model).__name__}",
        [
            "its weights are shared out over a device mesh none of whose dimensions is called "
            f'"{TENSOR}": name the one of tensor parallelism so'
        ],
    )


def same_share(mesh: DeviceMesh) -> DeviceMesh | None:
    """Of the weights' mesh, the dimension along which ranks have the same share of the heads; None where no
    other rank has. Raises FarspanError where the mesh does not tell."""
    names = mesh.mesh_dim_names or ()
    others = [name for i, name in enumerate(names) if name != TENSOR and mesh.size(i) > 1]
    if len(others) == 1:
        return mesh[others[0]]
    if not others and mesh.size() == torch.distributed.get_world_size():
        return None
    raise FarspanError(
        "The model's weights are shared out by tensor parallelism, and their mesh does not tell which ranks "
        'are to share a sequence: pass parallel= a torch DeviceMesh with the dimensions "cp" and '
        f'"{TENSOR}".'
    )


def count_heads(model: Any, config: Any, modules: dict[int, nn.Module]) -> dict[int, tuple[int, int]]:
    """(query heads, KV heads) by layer, as this rank computes them; every rank that shares the weights calls
    it.

    Found with a forward call of one token: the layout of the weights does not tell, since some plans leave a
    projection's output shared out and others gather it.
    """
    found: dict[int, tuple[int, int]] = {}

    def counter(index: int) -> Callable[..., Tensor]:
        def layer(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
            found[index] = q.shape[1], k.shape[1]
            return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])

        return layer

    device = next(model.parameters()).device
    register()
    before = attention_of(config)
    set_attention(config, NAME)
    for index, module in modules.items():
        setattr(module, ATTRIBUTE, counter(index))
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        set_attention(config, before)
        for module in modules.values():
            delattr(module, ATTRIBUTE)
    return found
