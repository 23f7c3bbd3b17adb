"""Mixers of the tests of state passing, and what the processes of these tests run."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from farspan.attention.hybrid.mixer import Mixer, Rotary, State, Transition
from farspan.attention.hybrid.passing import scan_advance, scan_transition
from farspan.attention.ops.scan import scan
from farspan.parallel.group.comm import Ranks
from farspan.parallel.mechanisms.layout import contiguous
from farspan.parallel.mechanisms.state_passing import pass_state

from ..hybrid import tools


class Convolved(Mixer):
    """A scan whose keys and values have passed a convolution over ``width`` tokens. Every third token of a
    row, counted from its first, has half its key, and RoPE's cosine scales the values, so that counts and
    positions matter. rule: "head", "channel" or "delta"."""

    name: ClassVar[str] = "convolved"

    def __init__(self, hidden_size: int = 64, rule: str = "head", width: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.hidden_size, self.rule, self.width, self.halo = hidden_size, rule, width, width - 1
        self.qkv = nn.Linear(hidden_size, 3 * 16, bias=False)
        self.conv = nn.Parameter(torch.empty(width, 3 * 16))
        self.gates = nn.Linear(hidden_size, 2 * 8)
        self.o_proj = nn.Linear(16, hidden_size, bias=False)
        made = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=made)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (2, 8, 8), (self.width - 1, 48), ()

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.conv.dtype, torch.float32)

    def _inputs(
        self, hidden: Tensor, state: State, mask: Tensor | None, rotary: Rotary | None
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """-> (arguments of scan, the convolution's last inputs, the count of tokens)."""
        batch, length, last = *hidden.shape[:2], self.width - 1
        real = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
        x = torch.cat([state[1].to(hidden), self.qkv(hidden)], 1)
        # padding first, then the last inputs, then the tokens
        order = nn.functional.pad(real, (last, 0), value=True).sort(dim=1, stable=True).indices
        x = x.gather(1, order[..., None].expand_as(x))
        y = nn.functional.silu(sum(x[:, i : i + length] * w for i, w in enumerate(self.conv)))
        back = real.sort(dim=1, stable=True).indices[..., None].expand_as(y)
        y = torch.zeros_like(y).scatter(1, back, y)
        count = state[2][:, None] + real.cumsum(1)
        q, k, v = y.view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        k = k * (1 - 0.5 * (count % 3 == 0).to(k))[:, None, :, None]
        if rotary is not None:
            v = v * rotary[0][:, None, :, :1].to(v)
        gate, other = self.gates(hidden).view(batch, length, 2, 8).unbind(2)
        g, beta = nn.functional.logsigmoid(gate), other[..., :2].sigmoid().transpose(1, 2)
        g = g.view(batch, length, 2, 4).repeat(1, 1, 1, 2).transpose(1, 2)
        g = g if self.rule == "channel" else g.mean(-1)
        more = {"beta": beta} if self.rule == "delta" else {}
        inputs = {"q": q, "k": k / (1 + k.norm(dim=-1, keepdim=True)), "v": v, "log_decay": g, "mask": mask}
        return inputs | more, x[:, length:], state[2] + real.sum(1).to(state[2])

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        state = state or self.initial_state(hidden.shape[0], hidden.device)
        inputs, tail, count = self._inputs(hidden, state, mask, rotary)
        out, s = scan(**inputs, state=state[0])
        return self.o_proj(out.transpose(1, 2).flatten(2).to(hidden)), (s, tail, count)

    def skip(self, state: State, tokens: Tensor) -> State:
        return state[0], state[1], state[2] + tokens.to(state[2])

    def transition(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Transition:
        inputs, *local = self._inputs(hidden, state, mask, rotary)
        inputs.pop("q")
        return *scan_transition(**inputs), *local

    def advance(self, state: State, transition: Transition) -> State:
        return scan_advance(state[0], *transition[:2]), *transition[2:]


OWN = {
    **{rule: Convolved(32, rule=rule) for rule in ("head", "channel", "delta")},
    "wide": Convolved(32, width=12),
}


def mixer_of(spec: str) -> Mixer:
    """A registered mixer by its spec, or one of this file by its rule."""
    return copy.deepcopy(OWN[spec]).double() if spec in OWN else tools.make(spec)


def call_of(mixer: Mixer, end: int, rows: int = 3) -> tuple[Tensor, Rotary]:
    """(hidden states, RoPE) of tokens 0 .. end - 1."""
    draw = torch.Generator().manual_seed(end)
    return torch.randn(rows, end, mixer.hidden_size, generator=draw).double(), tools.rotary(end)


def masks(length: int) -> dict[str, Tensor | None]:
    """No padding; padding on the left, over whole shards too; and on the right."""
    at, half = torch.arange(length)[None], length // 2 + 1
    first, last = torch.tensor([[0], [half], [length - 1]]), torch.tensor([[length], [2], [length - 1]])
    return {"none": None, "left": at >= first, "right": at < last}


def part(x: Rotary, at: Any) -> Rotary:
    return x[0][:, at], x[1][:, at]


def passed(group: Any, spec: str, calls: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """For calls of (tokens before, tokens, block multiple), by kind of padding: the outputs of all ranks, the
    state after the call, and the collectives and bytes of it."""
    torch.use_deterministic_algorithms(True)
    ranks, mixer, found = Ranks(group), mixer_of(spec), []
    for past, length, multiple in calls:
        (hidden, rotary), done = call_of(mixer, past + length), {}
        split = contiguous(past, past + length, ranks.size, multiple)
        at = past + split.take(ranks.rank)
        for kind, mask in masks(length).items():
            ranks.sent.clear(), ranks.calls.clear()
            with torch.no_grad():
                state = mixer(hidden[:, :past], None, None, part(rotary, slice(past)))[1] if past else None
                out, state = pass_state(mixer, hidden[:, at], state, mask, part(rotary, at), split, ranks)
            sent = dict(ranks.calls), dict(ranks.sent)
            done[kind] = split.joined(ranks.all_gather(out), 1), state, sent
        found.append(done)
    return found


def gradients(group: Any, spec: str, length: int) -> list[Tensor]:
    """The gradients of a loss over all tokens in the hidden states and in the mixer's parameters, summed over
    ranks."""
    ranks, mixer = Ranks(group), mixer_of(spec)
    hidden, rotary = call_of(mixer, length)
    split = contiguous(0, length, ranks.size)
    at, mask = split.take(ranks.rank), masks(length)["left"]
    mine = hidden.requires_grad_()[:, at]
    out, _ = pass_state(mixer, mine, None, mask, part(rotary, at), split, ranks)
    loss(split.real(out, ranks.rank, 1), split.layout().positions(ranks.rank)).backward()
    return [
        ranks.all_gather(x if x is not None else torch.zeros_like(p)).sum(0)
        for p, x in ((p, p.grad) for p in (hidden, *mixer.parameters()))
    ]


def loss(out: Tensor, positions: Tensor) -> Tensor:
    """A loss of outputs [B, T, hidden] at ``positions``, in which row 1 begins at the middle."""
    weight = (positions[None, :, None] + torch.arange(out.shape[2])).double().sin()
    return (out * weight)[[0]].sum() + out[:1].square().sum()
