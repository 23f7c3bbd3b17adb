"""What the processes of the tests run: prompts that reuse the caches of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import farspan
from farspan.runtime.hf import greedy_config
from farspan.runtime.prefixes import PrefixStore
from farspan.runtime.serving.reader import Call, Ending, Reader

from .jobs import BLOCK, Case, model_of


def prompts_with_common_beginnings() -> list[torch.Tensor]:
    """A prompt, its next turn, two others with its first 40 tokens, and one with its first 20."""

    def drawn(count: int, seed: int) -> torch.Tensor:
        return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(seed))

    first = drawn(70, 0)
    return [
        first,
        torch.cat([first, drawn(41, 1)], 1),
        torch.cat([first[:, :40], drawn(60, 2)], 1),
        torch.cat([first[:, :40], drawn(61, 3)], 1),
        torch.cat([first[:, :20], drawn(90, 4)], 1),
    ]


@dataclass
class Done:
    """For each prompt the tokens of its answer, and how many of its own were reused; then what a store of
    ``PrefixStore`` says: bytes, and caches dropped."""

    answers: list[list[int]] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    nbytes: int = 0
    dropped: int = 0


def read(case: Case, limit: int | None, loses: int | None = None, **parallel: Any) -> Done:
    """limit: bytes of the store; None: there is none. loses: the prompt before which it loses its caches."""
    model, done = model_of(case), Done()
    store = None if limit is None else PrefixStore(limit)
    with farspan.patch(model, case.spec, **case.patch, **parallel) as patched:
        reader = Reader(model, None, patched, store)
        for number, ids in enumerate(prompts_with_common_beginnings()):
            if store is not None and number == loses:
                store.clear()
            taken = reader.taken(ids[0].tolist())
            call = Call(ids, greedy_config(max_new_tokens=case.new, pad=0, eos=[]), seed=0)
            answer = reader.answer(call, taken, Ending(lambda: False))
            done.answers.append(answer[0, ids.shape[1] :].tolist())
            done.reused.append(taken.length)
    if store is not None:
        done.nbytes, done.dropped = store.nbytes, store.dropped
    return done


def read_over_ranks(group: Any, cases: list[Case], limit: int, loses: int | None = None) -> list[Done]:
    """``read`` of each case over the ranks of ``group``. loses: for rank 1 alone."""
    torch.use_deterministic_algorithms(True)
    config = farspan.ContextParallel(mesh=group, block=BLOCK)
    here = loses if torch.distributed.get_rank(group) == 1 else None
    return [read(case, limit, here, parallel=config) for case in cases]
