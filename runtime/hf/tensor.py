"""Tensor parallelism: which heads of each layer this rank has, and which ranks have the other heads.

transformers and torch store such weights as DTensors. The dimension of their device mesh is called "tp".
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
    """The device mesh over which tensor parallelism shards the model's weights; None where it does not.

    Raises Unsupported where no dimension of the mesh is called "tp".
    """
    if not any(hasattr(p, "placements") for p in model.parameters()):
        return None
    from torch.distributed.fsdp import FSDPModule

    managed = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in managed:
        module.reshard()  # weights that FSDP has gathered no longer name the dimensions of its mesh
    parameters: list[Any] = [p for p in model.parameters() if hasattr(p, "placements")]
    named = [p.device_mesh for p in parameters if TENSOR in (p.device_mesh.mesh_dim_names or ())]
    if named:
        return max(named, key=lambda mesh: mesh.ndim)
    if managed and all(sum(not x.is_replicate() for x in p.placements) <= 1 for p in parameters):
        return None  # only FSDP shards the weights, and it gathers them whole while a module runs
    raise Unsupported(
        f"farspan cannot patch {type(model).__name__}",
        [
            "its weights are sharded over a device mesh that has no dimension called "
            f'"{TENSOR}": give this name to the dimension of tensor parallelism'
        ],
    )


def same_heads(mesh: DeviceMesh) -> DeviceMesh | None:
    """The dimension of the weights' mesh along which all ranks have the same heads; None where no other rank
    has the heads of this one. Raises FarspanError where the mesh does not show this."""
    names = mesh.mesh_dim_names or ()
    others = [name for i, name in enumerate(names) if name != TENSOR and mesh.size(i) > 1]
    if len(others) == 1:
        return mesh[others[0]]
    if not others and mesh.size() == torch.distributed.get_world_size():
        return None
    raise FarspanError(
        "The model's weights are sharded by tensor parallelism, and their mesh does not show which ranks "
        'share a sequence: set parallel= to a torch DeviceMesh with the dimensions "cp" and '
        f'"{TENSOR}".'
    )


def count_heads(model: Any, config: Any, modules: dict[int, nn.Module]) -> dict[int, tuple[int, int]]:
    """By layer, the (number of query heads, number of KV heads) that this rank computes. Every rank of the
    weights' mesh must call this function.

    The numbers are found by a forward call of one token. The layout of the weights does not show them,
    because some plans leave the output of a projection sharded and others gather it.
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
