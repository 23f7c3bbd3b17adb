"""Score passages by the attention that the model itself pays to them from the query's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attention.boundaries import chunk_sums
from ...attention.errors import FarspanError, Unsupported
from ...attention.keys import Keys
from ...attention.kv import KV
from ...attention.received import attention_received
from ...attention.softmax import Softmax
from .. import hf
from ..models import plain_ids, positions
from ..patch import patch
from .scored import Ids, Scored
from .spec import ATTENTION, PIECE


class AttentionScorer:
    """A passage's score is the attention that a token of it receives from a token of the query, on average
    over these tokens, the query heads, and the layers of the third quarter of the model.

    Layers of the first half attend to what is near or frequent; later ones look up what the next tokens need
    (retrieval heads, arXiv 2404.15574; one layer as a filter of the prompt, GemFilter, 2409.17422; documents
    ranked by attention, 2410.02642). The layers behind the last one that counts do not run.

    The text is read in pieces of at most ``piece`` tokens: the opening, some passages, the query. So the cost
    is linear in the length, and a prompt may be longer than the model's positions. All pieces have about
    the same length, because a softmax over more keys gives each of them less. The attention is dense,
    whatever method the model is patched with, and the patch counts nothing of it.

    Raises FarspanError for a ``piece`` below 1. Raises Unsupported for a model that farspan cannot patch, has
    no layer with full attention, or is spread over ranks.
    """

    name = ATTENTION

    def __init__(self, model: Any, tokenizer: Any, piece: int = PIECE) -> None:
        if piece < 1:
            raise FarspanError(f"piece is a number of tokens, at least 1; got {piece}.")
        self._model, self._info = model, hf.inspect_model(model)
        self._piece = min(piece, positions(model) or piece)
        mixed = hf.mixers_of(self._info.decoder)
        kinds = self._info.kinds
        full = [i for i in self._info.attention if kinds[i] != hf.SLIDING and i not in mixed]
        reasons = [] if full else ["it has no layer with full attention"]
        if self._info.weights_mesh is not None or hf.over_ranks(self._info):
            reasons.append("it is spread over ranks: shorten the prompt before that, on one of them")
        if reasons:
            raise Unsupported("farspan cannot score passages by the attention of this model", reasons)
        self._gap = plain_ids(tokenizer, "\n\n")
        self.layers = full[len(full) // 2 : -(-3 * len(full) // 4)]

    def __call__(self, opening: Ids, passages: Sequence[Ids], query: Ids) -> Scored:
        """See ``Scorer``."""
        sizes = [len(passage) for passage in passages]
        asked = [*self._gap, *query]
        room = self._piece - len(opening) - len(asked)
        if max(sizes) > room:
            raise FarspanError(
                f"A passage of {max(sizes)} tokens, the head of the prompt ({len(opening)}) and the query "
                f"({len(asked)}) do not fit into a piece of {self._piece}: give a longer piece (up to "
                "the model's positions), or a shorter query."
            )
        scores: list[float] = []
        read = 0
        with self._watched() as received:
            for piece in even_pieces(sizes, room):
                some = torch.tensor(sizes[piece.start : piece.stop])
                inside = [token for passage in passages[piece.start : piece.stop] for token in passage]
                ids = [*opening, *inside, *asked]
                read += len(ids)
                shares = received(ids, len(query))[len(opening) : len(opening) + len(inside)]
                numbers = torch.arange(len(some)).repeat_interleave(some)
                scores += (chunk_sums(shares, numbers, len(some)) / some.clamp(min=1) / len(query)).tolist()
        return Scored(scores, read)

    @contextmanager
    def _watched(self) -> Iterator[Callable[[list[int], int], Tensor]]:
        """A context with a function (ids of T tokens, n) -> the attention [T] float32 that each token
        receives from the last n ones: summed over these, averaged over query heads and layers."""
        model, last = self._model, self.layers[-1]
        found: list[Tensor] = []
        asking = 0

        def attend(
            index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax: Softmax
        ) -> Tensor:
            if index in self.layers:
                keys = Keys(kv=KV(k, v), tq=q.shape[2], softmax=softmax)
                found.append(attention_received(q[:, :, -asking:], keys, k.shape[2]).mean((0, 1, 2)).cpu())
            if index == last:
                raise _Enough
            return hf.attend_densely(q, k, v, softmax).transpose(1, 2).contiguous()

        def received(ids: list[int], count: int) -> Tensor:
            nonlocal asking
            asking = count
            found.clear()
            with suppress(_Enough), torch.no_grad():
                model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
            return torch.stack(found).mean(0)

        with ExitStack() as undo:
            if not hf.is_patched(model):
                undo.enter_context(patch(model, "dense"))
            for index, module in self._info.attention.items():
                undo.callback(hf.replace_attention(module, partial(attend, index)))
            yield received


class _Enough(Exception):
    """Ends a call of the model once the last layer that counts has been observed."""


def even_pieces(sizes: Sequence[int], room: int) -> list[range]:
    """Consecutive passages of ``sizes`` tokens in as few pieces of at most ``room`` tokens as possible, the
    longest of them as short as possible."""
    best: list[range] = []
    low, high = max(sizes), room
    count = len(_filled(sizes, room))
    while low <= high:
        middle = (low + high) // 2
        pieces = _filled(sizes, middle)
        if len(pieces) == count:
            best, high = pieces, middle - 1
        else:
            low = middle + 1
    return best


def _filled(sizes: Sequence[int], room: int) -> list[range]:
    """Consecutive passages in pieces of at most ``room`` tokens, each as full as possible."""
    starts, tokens = [0], 0
    for i, size in enumerate(sizes):
        if tokens + size > room:
            starts.append(i)
            tokens = 0
        tokens += size
    ends = [*starts[1:], len(sizes)]
    return [range(a, b) for a, b in zip(starts, ends, strict=True)]
