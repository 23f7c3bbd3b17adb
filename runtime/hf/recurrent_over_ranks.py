"""The recurrent layers of transformers' own hybrid models over ranks.

Such a layer (Mamba-2, gated DeltaNet, a short convolution) reads earlier tokens at two places: the cache puts
the convolution's last inputs before those of the call, and the scan begins with the state in the cache. In a
call that is split over ranks, the layer's own forward runs on this rank's shard with both places replaced:
the cache by a :class:`_Passing`, which gets the inputs from the ranks before, and the scan by one that passes
the state along the ranks. All else of the layer looks at one token at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...attention.errors import FarspanError
from ...attention.hybrid.passing import scan_advance
from ...parallel.group.comm import Ranks
from ...parallel.mechanisms.layout import Split
from ...parallel.mechanisms.state_passing import fold, keep_in_graph, pass_columns
from ..session import Session
from .hooks import replace_forward
from .releases import CACHE_NAMES
from .transformers_private import global_of, source_of, with_globals


class _Passing:
    """The cache of one recurrent layer in one split call, as the layer's forward uses it. It keeps the states
    after the call in the cache proper, where there is one."""

    def __init__(self, layer: nn.Module, cache: Any, split: Split, ranks: Ranks) -> None:
        self.cache, self.split, self.ranks = cache, split, ranks
        index = layer.layer_idx
        self.count = split.layout().count(ranks.rank)  # of this rank's tokens, without split padding
        self.columns = None if cache is None else cache.get_conv_state(index, state_idx=0)
        self.state = None if cache is None else cache.get_recurrent_state(index, state_idx=0)

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        """None, with which the layer runs its form for several tokens."""

    get_recurrent_state = get_conv_state

    def is_recording_past(self, *_: Any) -> bool:
        return False

    def update_conv_state(self, x: Tensor, *args: Any, conv_kernel_size: int, **kwargs: Any) -> Tensor:
        """x [B, channels, split.rows] -> the same behind the last ``conv_kernel_size`` inputs before them."""
        before = self.columns
        if before is None:
            before = x.new_zeros(*x.shape[:2], conv_kernel_size)
        mine, after, every = pass_columns(x, before, self.split, self.ranks)
        if self.cache is not None:
            self.cache.update_conv_state(after, *args, conv_kernel_size=conv_kernel_size, **kwargs)
        return torch.cat([keep_in_graph(mine, *every), x], 2)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> None:
        if self.cache is not None:
            self.cache.update_recurrent_state(*args, **kwargs)

    def passed(
        self,
        inputs: Sequence[Tensor],
        zero: Tensor,
        transition: Callable[[], tuple[Tensor, Tensor]],
        run: Callable[[Tensor], Tensor],
        unit: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The outputs [B, split.rows, H, D] of a scan, and the state after the call.

        inputs: all tensors of the scan, the first of them [B, split.rows, H, D]. zero: the state before the
        first token. transition: returns what this rank's tokens do to a state; unit: a change that does
        nothing. run: the outputs of this rank's tokens by the state before them.
        """
        change = transition() if self.count else (unit, torch.zeros_like(zero))
        before = zero if self.state is None else self.state.to(zero.dtype)
        mine, after, every = fold(before, change, _advance, self.ranks, inputs)
        out = run(mine) if self.count else inputs[0][:, :0]
        out = F.pad(out, (0, 0, 0, 0, 0, self.split.rows - self.count))
        return keep_in_graph(out, *every), after


def _advance(state: Tensor, change: tuple[Tensor, ...]) -> Tensor:
    return scan_advance(state, *change)


def _gated_delta(
    passing: _Passing,
    run: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: None,
    output_final_state: bool,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule in chunks, query, key, value [B, T, H, D]. The change of a shard is a matrix: the
    state that the identity becomes where the values are zero."""
    n, (batch, _, heads, dv), dk = passing.count, value.shape, key.shape[3]
    inputs = value, query, key, g, beta
    v, q, k, g, beta = (x[:, :n] for x in inputs)
    zero = torch.zeros(batch, heads, dk, dv, device=v.device)
    one = torch.eye(dk, device=v.device).expand(batch, heads, dk, dk)

    def scan(v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return run(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, **how)

    def transition() -> tuple[Tensor, Tensor]:
        end = scan(torch.cat([v, v.new_zeros(batch, n, heads, dk)], 3), torch.cat([zero, one], 3))[1]
        return end[..., dv:], end[..., :dv]

    return passing.passed(inputs, zero, transition, lambda state: scan(v, state)[0], one)


def _mamba2(
    passing: _Passing,
    run: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    initial_states: None,
    return_final_states: bool,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan in chunks, x [B, T, H, P], dt [B, T, H], B, C [B, T, G, N], with softplus of dt. The
    change of a shard is one decay for each head."""
    n, (batch, _, heads, dim) = passing.count, x.shape
    part = [x[:, :n], dt[:, :n], A, B[:, :n], C[:, :n]]
    how |= {"dt_bias": dt_bias, "dt_limit": dt_limit, "return_final_states": True}

    def transition() -> tuple[Tensor, Tensor]:
        step = F.softplus(part[1] + dt_bias.to(dt.dtype)).clamp(*dt_limit).float()
        decay = (A.float() * step.sum(1)).exp()[..., None, None]
        return decay, run(*part, initial_states=None, **how)[1].float()

    zero = torch.zeros(batch, heads, dim, B.shape[3], device=x.device)
    inputs = x, dt, A, B, C, *(y for y in how.values() if isinstance(y, Tensor))
    return passing.passed(
        inputs,
        zero,
        transition,
        lambda state: run(*part, initial_states=state, **how)[0],
        zero[..., :1, :1] + 1,
    )


_SCANS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "torch_chunk_gated_delta_rule": _gated_delta,
    "mamba2_chunk_scan": _mamba2,
}


def passes_states(module: nn.Module) -> bool:
    """Whether a module is a recurrent layer whose states can be passed along ranks, by its source: it keeps a
    convolution's inputs in the cache, and a state, if any, of one of the known scans."""
    forward = type(module).forward
    source = source_of(forward) or ""
    known = any(f"{name}(" in source and global_of(forward, name) is not None for name in _SCANS)
    halo = "cache.update_conv_state(" in source and "conv_kernel_size=" in source
    return halo and (known or "update_recurrent_state" not in source)


def pass_states(decoder: nn.Module, session: Session) -> list[Callable[[], None]]:
    """Make the recurrent layers of a decoder pass their states along ranks. Returns the undo steps."""
    return [
        replace_forward(module, partial(_forward, module, session))
        for module in decoder.modules()
        if passes_states(module)
    ]


def _forward(
    layer: nn.Module, session: Session, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    call = session.call
    if call is None or call.split is None:
        if call is None and session.mesh is not None and torch.is_grad_enabled() and not session.off:
            raise FarspanError(
                "Gradient checkpointing runs a recurrent layer again in the backward pass, where states are "
                "not passed between ranks: call model.gradient_checkpointing_disable()."
            )
        return original(*args, **kwargs)
    forward = type(layer).forward
    given = inspect.signature(inspect.unwrap(forward)).bind(layer, *args, **kwargs)
    name = next(x for x in (*CACHE_NAMES, "cache_params") if x in given.signature.parameters)
    passing = _Passing(layer, given.arguments.get(name), call.split, session.ranks)
    given.arguments[name] = passing
    scans = {x: (scan, global_of(forward, x)) for x, scan in _SCANS.items()}
    names = {x: partial(scan, passing, run) for x, (scan, run) in scans.items() if run is not None}
    return with_globals(forward, names)(*given.args, **given.kwargs)
