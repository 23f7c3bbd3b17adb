"""How the ranks of a sequence find each other and make their process groups.

    torchrun --nproc-per-node 8 script.py        farspan.patch(model, ..., parallel="auto")

Every rank of the job runs the same script. ``join`` makes process groups of its own, with a timeout of its
own, so that farspan's collectives neither wait for other groups nor hang.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import math
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...attention.errors import FarspanError, SpecError
from .c10d import default_store, new_group
from .comm import Ranks
from .config import ContextParallel
from .digest import minority, text_hash
from .meeting import meet, named, one_line, rendezvous
from .mesh import Mesh
from .watch import Watch

DIMENSIONS = ("cp", "context")  # names of a DeviceMesh's dimension whose ranks share a sequence

# One rank may load a model more slowly than another: ranks wait for each other this many timeouts.
MEETING = 10

_START = "start it as `torchrun --nproc-per-node N script.py` (docs/MULTI_GPU.md)"


def join(parallel: Any, device: torch.device | str) -> Mesh | None:
    """Meet the ranks that share a sequence. Every rank of the job, or of the mesh given, makes this call.

    parallel: a ContextParallel; "auto" for all ranks of the launcher or of the initialised default group; a
        torch DeviceMesh (1-D, or with a dimension "cp" or "context"), an accelerate Accelerator or
        ParallelismConfig, or a process group; a Mesh, whose groups are borrowed; None.
    device: where the model is. If torch.distributed is not initialised, it is initialised for this device.
    -> the mesh, or None where one process is alone.
    Raises FarspanError: no launcher; a size that does not divide the job; a mesh without such a dimension; a
        device that does not exist or that two ranks use; ranks with different configurations; ranks that do
        not come in time.
    """
    if isinstance(parallel, Mesh):
        return dataclasses.replace(parallel, borrowed=True)
    config = _config(parallel)
    if config is None or (config.size == 1 and config.mesh is None):
        return None
    device = torch.device(device)
    if config.mesh is None and not dist.is_initialized() and not _launched(config):
        return None
    if not dist.is_initialized():
        _initialise(device, config.timeout)
    rank = dist.get_rank()
    members, mine = _places(config, device, rank)
    config = dataclasses.replace(config, size=len(mine), mesh=None)
    if config.size == 1:
        return None
    if config.backend == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise FarspanError('backend="deepspeed" needs DeepSpeed: pip install "farspan[parallel]".')
    return _meet(config, device, members, mine, rank)


def _config(parallel: Any) -> ContextParallel | None:
    if parallel is None or isinstance(parallel, ContextParallel):
        return parallel
    if parallel == "auto":
        return ContextParallel()
    if _is_mesh(parallel):
        return ContextParallel(mesh=parallel)
    raise SpecError(
        f'parallel={parallel!r} was given; a farspan.ContextParallel, "auto", a torch DeviceMesh, an '
        "accelerate Accelerator or ParallelismConfig, or None is allowed."
    )


def _is_mesh(given: Any) -> bool:
    # accelerate's two classes are known by their attributes, so that accelerate is not imported
    return isinstance(given, (DeviceMesh, dist.ProcessGroup)) or (
        hasattr(given, "torch_device_mesh") or hasattr(given, "get_device_mesh")
    )


# --- which ranks take part -------------------------------------------------------------------------------


def _launched(config: ContextParallel) -> bool:
    """Whether a launcher has started this process as one of several. torchrun, accelerate and deepspeed set
    the same environment variables."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        missing = [n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        if missing or not size.isdigit():
            raise FarspanError(
                f"WORLD_SIZE={size} is set, but {', '.join(missing) or 'it'} is not as a launcher sets it; "
                f"{_START}."
            )
        return True
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise FarspanError(
            f"srun has started {tasks} tasks, and none of them knows the others; let srun start one torchrun "
            "per node (docs/MULTI_GPU.md)."
        )
    if config.size is not None:
        raise FarspanError(f"ContextParallel(size={config.size}) in a job of one process; {_START}.")
    return False


def _initialise(device: torch.device, timeout: float) -> None:
    if "WORLD_SIZE" not in os.environ:
        raise FarspanError(f"A mesh was given, but torch.distributed is not initialised; {_START}.")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise FarspanError(
                f"Rank {os.environ['RANK']} wants cuda:{index}, but {socket.gethostname()} has "
                f"{torch.cuda.device_count()} such devices; start at most one process per device "
                "(--nproc-per-node)."
            )
        torch.cuda.set_device(index)
    seconds = MEETING * timeout
    try:
        store, rank, size = rendezvous(seconds)
        dist.init_process_group(
            _transport(device), store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
    except FarspanError:
        raise
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise FarspanError(
            f"Rank {os.environ['RANK']} did not meet the {os.environ['WORLD_SIZE']} ranks of the job at "
            f"{where}: {one_line(error)}"
        ) from error
    atexit.register(_leave_job)


def _leave_job() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _transport(device: torch.device) -> str:
    """torch.distributed's backend for tensors on ``device``."""
    known = {"cuda": "nccl", "cpu": "gloo"}
    return known.get(device.type) or dist.get_default_backend_for_device(device)


def _places(config: ContextParallel, device: torch.device, rank: int) -> tuple[list[int], list[int]]:
    """-> (the ranks of the job that make this call, those of them that share this rank's sequence)."""
    given = config.mesh
    if given is None:
        world = dist.get_world_size()
        size = config.size or world
        if world % size:
            raise FarspanError(
                f"ContextParallel(size={size}) in a job of {world} ranks: the number of ranks must be a "
                f"multiple of size; start {world // size * size or size} of them, or leave size out."
            )
        first = rank // size * size
        members, mine = list(range(world)), list(range(first, first + size))
    elif isinstance(given, dist.ProcessGroup):
        members = mine = dist.get_process_group_ranks(given)
    else:
        members, mine = _column(_device_mesh(given, device), rank)
    if config.size not in (None, len(mine)):
        raise FarspanError(
            f"ContextParallel(size={config.size}) was given with a mesh of {len(mine)} ranks in that "
            f"dimension; leave size out, or make it {len(mine)}."
        )
    if config.ulysses is not None and len(mine) % config.ulysses:
        raise FarspanError(
            f"ContextParallel(ulysses={config.ulysses}) does not divide {len(mine)} ranks; give a divisor."
        )
    return members, mine


def _device_mesh(given: Any, device: torch.device) -> DeviceMesh:
    if isinstance(given, DeviceMesh):
        return given
    if not _is_mesh(given):
        raise SpecError(
            f"ContextParallel(mesh={given!r}) was given; a torch DeviceMesh, a process group, or "
            "accelerate's Accelerator or ParallelismConfig is allowed."
        )
    mesh = (
        given.torch_device_mesh if hasattr(given, "torch_device_mesh") else given.get_device_mesh(device.type)
    )
    if mesh is None:
        raise FarspanError(
            f"{type(given).__name__} has no device mesh; give it ParallelismConfig(cp_size=...)."
        )
    return mesh


def _column(mesh: DeviceMesh, rank: int) -> tuple[list[int], list[int]]:
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    found = [i for i, name in enumerate(names) if name in DIMENSIONS]
    if not found and mesh.ndim == 1 and names[0] not in ("tp", "pp", "ep", "dp"):
        found = [0]
    if not found:
        raise FarspanError(
            f"The mesh given has the dimensions {names}; name the one whose ranks share a sequence "
            '"cp" or "context".'
        )
    size = mesh.size(found[0])
    columns = mesh.mesh.movedim(found[0], -1).reshape(-1, size)
    mine = [column for column in columns.tolist() if rank in column]
    if not mine:
        raise FarspanError(f"Rank {rank} is not in the mesh given: {mesh.mesh.tolist()}.")
    return columns.flatten().tolist(), mine[0]


# --- making the groups ------------------------------------------------------------------------------------


def _meet(
    config: ContextParallel, device: torch.device, members: list[int], mine: list[int], rank: int
) -> Mesh:
    store = default_store()
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "mesh"}
    inside = int(os.environ.get("LOCAL_WORLD_SIZE", len(mine)))
    offer = {"options": options, "device": _identity(device), "inside": inside}
    place = f"farspan/{text_hash(repr(members)):x}"
    name, given = meet(store, place, members, rank, offer, MEETING * config.timeout)
    _compare(given, members)
    inner = _ulysses_degree(config, [other["inside"] for other in given.values()])
    config = dataclasses.replace(config, ulysses=inner)

    watch = Watch(store, f"farspan/{name}", members, mine, rank, config.timeout)

    def group(kind: str, ranks: list[int]) -> Ranks:
        called = f"farspan/{name}/{kind}/{ranks[0]}"
        watch.groups.append(
            Ranks(new_group(called, ranks, rank, _transport(device), config.timeout), watch.guard)
        )
        return watch.groups[-1]

    try:
        with watch.guard("join"):
            whole, ulysses, ring = group("ranks", mine), None, None
            if inner is not None:
                at = mine.index(rank)
                ulysses = group("ulysses", mine[at // inner * inner :][:inner])
                ring = group("ring", mine[at % inner :: inner])
    except BaseException:
        watch.close()
        raise
    return Mesh(whole, ulysses, ring, config, device, watch)


def _ulysses_degree(config: ContextParallel, local: list[int]) -> int | None:
    """How many ranks exchange heads in USP. local: for each rank, the number of ranks on its machine."""
    size = config.size or 1
    if config.ulysses is not None or config.mechanism != "usp":
        return config.ulysses
    inside = math.gcd(size, *local)
    if 1 < inside < size:
        return inside
    return max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)  # one machine, or one rank on each


def _identity(device: torch.device) -> str | None:
    """A name of the accelerator that is unique in the job; None for a CPU, which ranks may share."""
    if device.type != "cuda":
        return None
    return f"{device} of {socket.gethostname()} ({torch.cuda.get_device_properties(device).uuid})"


def _compare(given: dict[int, dict[str, Any]], members: list[int]) -> None:
    """Refuse ranks that have different options, or that share a device."""
    faults = []
    for option in given[members[0]]["options"]:
        values = [repr(given[r]["options"].get(option)) for r in members]
        if odd := minority(values):
            those = f"{values[odd[0]]} on {named([members[i] for i in odd])}"
            others = next(v for i, v in enumerate(values) if i not in odd)
            faults.append(f"{option} is {those} and {others} on the others")
    if faults:
        raise FarspanError(f"The ranks have different ContextParallel configurations: {'; '.join(faults)}.")
    places: dict[str, int] = {}
    for r in members:
        device = given[r]["device"]
        if device is not None and device in places:
            raise FarspanError(
                f"{named([places[device], r]).capitalize()} both have their model on {device}; load it on "
                "f\"cuda:{os.environ['LOCAL_RANK']}\", each rank its own device."
            )
        places[device] = r
