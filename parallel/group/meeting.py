"""How the processes of a job find each other: the launcher's store, who is there, groups under names of their
own."""

from __future__ import annotations

import json
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ...attention.errors import FarspanError


def rendezvous(seconds: float) -> tuple[dist.Store, int, int]:
    """The job's store, this rank and the number of ranks, by the launcher's environment.

    A restarted job (torchrun --max-restarts) is given the store of the one that failed, where torch's groups
    would read the addresses of processes that have gone: so every start has a name of its own.
    """
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))
    name, _ = meet(store, "farspan/job", list(range(size)), rank, None, seconds)
    return dist.PrefixStore(f"farspan/{name}", store), rank, size


def meet(
    store: dist.Store, key: str, ranks: list[int], rank: int, says: Any, seconds: float
) -> tuple[str, dict[int, Any]]:
    """A name for this meeting that no other one has, and what each of ``ranks`` says (JSON), by rank.

    What is left of earlier meetings under the same key, which some or all of those here may have attended,
    does no harm: the first rank names the meeting, and another one goes by a name once it was counted in
    under it. FarspanError names the ranks that do not come within ``seconds``.
    """
    try:
        meeting = _opened if rank == ranks[0] else _attended
        name, came = meeting(store, key, ranks, rank, says, seconds)
    except RuntimeError as error:
        raise FarspanError(f"Rank {rank} lost the job's store: {one_line(error)}") from error
    missing = [other for other in ranks if other not in came]
    if missing:
        raise FarspanError(
            f"{named(missing).capitalize()} did not come within {seconds:g} s: all ranks of a job make the "
            "same calls, patch(..., parallel=...) first."
        )
    return name, {other: came[other][1] for other in ranks}


_Came = dict[int, tuple[str, Any]]  # rank -> (a name of its process, what it says)


def _opened(
    store: dist.Store, key: str, ranks: list[int], rank: int, says: Any, seconds: float
) -> tuple[str, _Came]:
    name = uuid.uuid4().hex
    store.set(f"{key}/open", name)
    keys = {other: f"{key}/{name}/{other}" for other in ranks[1:]}
    with suppress(dist.DistStoreError):
        store.wait(list(keys.values()), timedelta(seconds=seconds))
    came = {other: json.loads(store.get(k)) for other, k in keys.items() if store.check([k])}
    came[rank] = (name, says)
    store.set(f"{key}/{name}/all", json.dumps(came))
    return name, came


def _attended(
    store: dist.Store, key: str, ranks: list[int], rank: int, says: Any, seconds: float
) -> tuple[str, _Came]:
    me, until = uuid.uuid4().hex, time.monotonic() + seconds + 1  # the first rank gives up before
    names: list[str] = []  # several, where the first one is left of an earlier meeting
    while time.monotonic() < until:
        # What is open is read first: if it is the next meeting, the one attended has an end to be found.
        name = store.get(f"{key}/open").decode() if store.check([f"{key}/open"]) else None
        for attended in names:
            if store.check([f"{key}/{attended}/all"]):
                came = {int(r): x for r, x in json.loads(store.get(f"{key}/{attended}/all")).items()}
                if rank in came and came[rank][0] == me:
                    return attended, came
        if name is not None and name not in names:
            store.set(f"{key}/{name}/{rank}", json.dumps((me, says)))
            names.append(name)
        time.sleep(0.05)
    return "", dict.fromkeys(ranks[1:], ("", None))  # without the first rank nobody knows of the others


def own(store: dist.Store, seconds: float) -> dist.Store:
    """A connection of one's own to a store, which answers one caller at a time; its own timeout, too."""
    mine: dist.Store = store.clone()  # type: ignore[attr-defined]
    mine.set_timeout(timedelta(seconds=seconds))
    return mine


def one_line(error: BaseException) -> str:
    """An error's text, fit for a sentence."""
    return " ".join(str(error).split())[:500]


def named(ranks: list[int]) -> str:
    """'rank 1', 'ranks 1 and 2', 'ranks 0, 1 and 2'."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
