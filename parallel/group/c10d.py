"""The private functions of torch.distributed that farspan calls. No other module of this layer names them.

tests/test_private_apis.py checks each name and its signature in the installed release of torch.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


def default_store() -> dist.Store:
    """The key-value store through which the ranks of the job met. The public API returns it nowhere:
    ``init_process_group`` makes the store and keeps it."""
    return distributed_c10d._get_default_store()


def new_group(name: str, ranks: list[int], rank: int, transport: str, seconds: float) -> dist.ProcessGroup:
    """A process group of the job's ``ranks``, this one being ``rank``. Only its members make this call.

    name: unique in the job. transport: torch's backend, such as "gloo". seconds: timeout of a collective.

    The public ``dist.new_group`` falls short in two ways. It must be called by every rank of the job. With
    ``use_local_synchronization`` its members alone call it, but then all of them must have made equally many
    groups, and a new group takes the name of a destroyed one, whose addresses are still in the store.
    """
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(rank),
        ranks,
        dist.Backend(transport),
        default_store(),
        name,  # type: ignore[arg-type]
        timeout=timedelta(seconds=seconds),
        group_desc="farspan",
    )
    distributed_c10d._world.pg_group_ranks[group] = {r: i for i, r in enumerate(ranks)}
    return group
