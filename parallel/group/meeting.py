"""How the processes of a job find each other through the launcher's store."""

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

    torchrun --max-restarts starts a failed job again with the same store, in which the addresses of the ended
    processes still are. So every start of a job uses a key prefix of its own. seconds: until it gives up.
    """
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))
    name, _ = meet(store, "farspan/job", list(range(size)), rank, None, seconds)
    return dist.PrefixStore(f"farspan/{name}", store), rank, size


def meet(
    store: dist.Store, key: str, ranks: list[int], rank: int, value: Any, seconds: float
) -> tuple[str, dict[int, Any]]:
    """Wait until all of ``ranks`` have made this call with the same ``key``.

    -> (a name that no other meeting has, the ``value`` (JSON) that each rank has given).

    The store may still hold earlier meetings of the same ranks under the same key. The first rank names each
    meeting, and any other rank uses a name only after the first has listed it under that name. Raises
    FarspanError with the ranks that have not come within ``seconds``.
    """
    try:
        meeting = _lead if rank == ranks[0] else _follow
        name, came = meeting(store, key, ranks, rank, value, seconds)
    except RuntimeError as error:
        raise FarspanError(f"Rank {rank} lost the job's store: {one_line(error)}") from error
    missing = [other for other in ranks if other not in came]
    if missing:
        raise FarspanError(
            f"{named(missing).capitalize()} did not come within {seconds:g} s. All ranks of a job must make "
            "the same calls, patch(..., parallel=...) first."
        )
    return name, {other: came[other][1] for other in ranks}


_Arrivals = dict[int, tuple[str, Any]]  # rank -> (a name of its process, its value)


def _lead(
    store: dist.Store, key: str, ranks: list[int], rank: int, value: Any, seconds: float
) -> tuple[str, _Arrivals]:
    name = uuid.uuid4().hex
    store.set(f"{key}/open", name)
    keys = {other: f"{key}/{name}/{other}" for other in ranks[1:]}
    with suppress(dist.DistStoreError):
        store.wait(list(keys.values()), timedelta(seconds=seconds))
    came = {other: json.loads(store.get(k)) for other, k in keys.items() if store.check([k])}
    came[rank] = (name, value)
    store.set(f"{key}/{name}/all", json.dumps(came))
    return name, came


def _follow(
    store: dist.Store, key: str, ranks: list[int], rank: int, value: Any, seconds: float
) -> tuple[str, _Arrivals]:
    me, until = uuid.uuid4().hex, time.monotonic() + seconds + 1  # the first rank gives up before
    names: list[str] = []  # several where the first one is an earlier meeting's
    while time.monotonic() < until:
        # The open name is read first: if it is the next meeting's, the list of this one is in the store.
        name = store.get(f"{key}/open").decode() if store.check([f"{key}/open"]) else None
        for joined in names:
            if store.check([f"{key}/{joined}/all"]):
                came = {int(r): x for r, x in json.loads(store.get(f"{key}/{joined}/all")).items()}
                if rank in came and came[rank][0] == me:
                    return joined, came
        if name is not None and name not in names:
            store.set(f"{key}/{name}/{rank}", json.dumps((me, value)))
            names.append(name)
        time.sleep(0.05)
    return "", dict.fromkeys(ranks[1:], ("", None))  # without the first rank, no rank knows the others


def own_connection(store: dist.Store, seconds: float) -> dist.Store:
    """A second connection to a store, with a timeout of its own. One connection serves one caller at a
    time."""
    mine: dist.Store = store.clone()  # type: ignore[attr-defined]
    mine.set_timeout(timedelta(seconds=seconds))
    return mine


def one_line(error: BaseException) -> str:
    """The text of an error on one line, at most 500 characters of it."""
    return " ".join(str(error).split())[:500]


def named(ranks: list[int]) -> str:
    """'rank 1', 'ranks 1 and 2', 'ranks 0, 1 and 2'."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
