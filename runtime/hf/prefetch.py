"""Fetch rows from host memory or disk before a layer asks for them.

In a decode step, the queries of a layer are predicted from the input of the attention of the layer before it
(Double Sparsity's offloading, 2408.07092). What the decode method selects for these is copied to the device
meanwhile. A wrong prediction changes no result: a row that is missing then is fetched when it is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...attention.attend import DECODE_ROWS
from ..layer import Layer
from ..session import Session
from .hooks import Hook
from .models import ModelInfo


def prefetch_rows(info: ModelInfo, layers: Mapping[int, Layer], session: Session) -> list[Callable[[], None]]:
    """Let each layer of a model begin to fetch the rows of the next one. Returns the undo steps."""
    undo: list[Callable[[], None]] = []
    for index, module in info.attention.items():
        after = index + 1
        if after not in layers or not _together(module, info.attention[after]):
            continue
        if (project := _projection(info, after)) is not None:
            begin = Hook(partial(_begin, session, layers[after], project))
            undo.append(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
    return undo


def _together(*modules: nn.Module) -> bool:
    """Whether all weights of some modules are on one device, where they can be read at any time."""
    devices = {p.device for module in modules for p in module.parameters()}
    return len(devices) == 1 and "meta" not in {device.type for device in devices}


Project = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states, cos, sin -> queries [B, H, n, D]


def _projection(info: ModelInfo, index: int) -> Project | None:
    """How a layer makes queries of hidden states [B, n, hidden]; None where that is not known."""
    module: Any = info.attention[index]
    own, heads = type(module), info.layer_info(index).num_heads
    rotate = getattr(inspect.getmodule(own), "apply_rotary_pos_emb", None)
    linear, norm = getattr(module, "q_proj", None), getattr(module, "q_norm", None)
    parameters = inspect.signature(own.forward).parameters
    if rotate is None or not isinstance(linear, nn.Module) or "position_embeddings" not in parameters:
        return None

    def project(hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = linear(hidden).unflatten(-1, (heads, -1))
        q = (q if norm is None else norm(q)).transpose(1, 2)
        turned: Tensor = rotate(q, q[:, :1], cos, sin)[0]
        return turned

    return project


def _begin(
    session: Session,
    layer: Layer,
    project: Project,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    hidden, angles = given["hidden_states"], given.get("position_embeddings")
    if session.off or angles is None or hidden.shape[1] > DECODE_ROWS:
        return
    layer.prefetch(partial(project, hidden, *angles), (hidden, *angles))
