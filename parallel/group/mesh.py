"""How many ranks share a sequence, how they find each other, and that they agree on what they do.

    torchrun --nproc-per-node 8 script.py        farspan.patch(model, ..., parallel="auto")

Every rank of the job runs the same script. ``join`` makes process groups of its own with a timeout of its
own, so that farspan's collectives neither wait for others nor hang.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import math
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from ...attention.checks import whole_number
from ...attention.errors import FarspanError, SpecError
from .comm import Ranks
from .digest import bit_hash, minority, text_hash
from .meeting import meet, named, new_group, one_line, rendezvous
from .watch import Watch

MECHANISMS = ("auto", "gather", "ring", "ulysses", "usp", "pass_q")
BACKENDS = ("torch", "deepspeed")
DIMENSIONS = ("cp", "context")

# Loading a model takes one rank longer than another: ranks wait for each other this many timeouts.
MEETING = 10

_START = "start it as `torchrun --nproc-per-node N script.py` (docs/MULTI_GPU.md)"


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """How a sequence is spread over ranks.

    size: ranks that share one sequence; None: all of the job, or of the mesh. A job of a multiple of ``size``
        runs that many copies, ranks 0 .. size - 1 the first.
    mechanism: how prefill attention meets keys on other ranks: "auto" (the least bytes), "gather" (all-gather
        of keys and values), "ring", "ulysses" (heads instead of positions), "usp" (Ulysses inside, ring
        across) or "pass_q" (queries travel instead of keys).
    ulysses: degree of Ulysses inside USP, a divisor of ``size``; None: the ranks of one machine, or about the
        root of ``size`` where that is all of them or one.
    block: tokens; new tokens are stored in turn, in blocks of this many.
    timeout: seconds that a collective waits for a rank before all ranks stop.
    check: compare inputs and outputs over the ranks by hash, so that they cannot differ silently.
    backend: who runs Ulysses' all-to-all, "torch" or "deepspeed".
    mesh: a torch DeviceMesh (1-D, or with a dimension "cp" or "context"), an accelerate Accelerator or
        ParallelismConfig, or a process group to take the ranks from; None: the launcher's.
    """

    size: int | None = None
    mechanism: str = "auto"
    ulysses: int | None = None
    block: int = 64
    timeout: float = 30.0
    check: bool = True
    backend: str = "torch"
    mesh: Any = None

    def __post_init__(self) -> None:
        def wrong(name: str, allowed: str) -> SpecError:
            return SpecError(f"ContextParallel({name}={getattr(self, name)!r}): {allowed}.")

        for name in ("size", "ulysses", "block"):
            value = getattr(self, name)
            number = whole_number(value)
            if (number is None or number < 1) and (value is not None or name == "block"):
                or_none = "" if name == "block" else ", or None"
                raise wrong(name, f"a whole number of at least 1{or_none}, is allowed")
            object.__setattr__(self, name, number)
        if self.mechanism not in MECHANISMS:
            raise wrong("mechanism", f"one of {', '.join(MECHANISMS)} is allowed")
        if self.backend not in BACKENDS:
            raise wrong("backend", f"one of {', '.join(BACKENDS)} is allowed")
        if not isinstance(self.check, bool):
            raise wrong("check", "True or False is allowed")
        seconds = self.timeout
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise wrong("timeout", "a number of seconds above 0 is allowed")
        if self.ulysses is not None:
            if self.mechanism != "usp":
                raise wrong("ulysses", f'only mechanism="usp" has it, not {self.mechanism!r}')
            if self.size is not None and self.size % self.ulysses:
                raise wrong("ulysses", f"a divisor of size={self.size} is allowed")


@dataclass
class Mesh:
    """The ranks that share this rank's sequence.

    ranks: all of them. config: with ``size`` and ``ulysses`` known. device: where collectives' tensors are.
    ulysses, ring: for USP, this rank's neighbours (rank r * U + u: those of the same r) and those across (of
        the same u); None for other mechanisms.
    watch: turns a failing rank into one sentence on all.
    lent: the groups are another one's, who closes them.
    """

    ranks: Ranks
    ulysses: Ranks | None
    ring: Ranks | None
    config: ContextParallel
    device: torch.device
    watch: Watch
    lent: bool = False

    @property
    def size(self) -> int:
        """Ranks that share one sequence."""
        return self.ranks.size

    @property
    def rank(self) -> int:
        """This one's place among them."""
        return self.ranks.rank

    def sent(self) -> int:
        """Bytes that this rank has sent so far, what it takes to ``agree`` left out."""
        return sum(sum(r.sent.values()) - r.sent["agree"] for r in self.watch.groups)

    def agree(self, values: dict[str, Tensor | int | str | None]) -> None:
        """That every rank has the same values, dtype, shape and bits: one all-gather of 128 bytes.

        values: at most 15, by the name that an error calls them. FarspanError says which of them differ, and
        on which ranks from the majority (from rank 0's, if there is none).
        """
        if len(values) >= _SLOTS:
            raise ValueError(f"{len(values)} values to agree on, at most {_SLOTS - 1} fit")
        row = torch.zeros(_SLOTS, dtype=torch.int64)
        tensors: dict[int, Tensor] = {}
        row[0] = text_hash(repr(list(values)))  # ranks at different places of the program have other names
        for i, value in enumerate(values.values(), start=1):
            if isinstance(value, Tensor):
                tensors[i] = bit_hash(value)
                row[i] = text_hash(f"{value.dtype} {tuple(value.shape)}")
            else:
                row[i] = text_hash(f"{type(value).__name__} {value}")
        row = row.to(self.device)
        for i, tensor in tensors.items():
            row[i] ^= tensor.to(self.device)
        table = self.ranks.all_gather(row, "agree").tolist()
        columns = zip(("", *values), zip(*table, strict=True), strict=False)
        odd = {name: self._named(minority(column)) for name, column in columns if minority(column)}
        if "" in odd:  # the columns are not comparable
            raise FarspanError(
                f"{odd[''].capitalize()} came to another step than the other ranks: every rank must make the "
                "same calls with the same options."
            )
        if odd:
            raise FarspanError(
                f"The ranks have different values: {', '.join(f'{n} on {r}' for n, r in odd.items())}. Every "
                "rank must be given the same inputs, options and seed."
            )

    def _named(self, places: list[int]) -> str:
        return named([self.ranks.global_rank(place) for place in places])

    def close(self) -> None:
        """Leave the groups that ``join`` has made. The job's own group stays."""
        if not self.lent:
            self.watch.close()


_SLOTS = 16


def join(parallel: Any, device: torch.device | str) -> Mesh | None:
    """Meet the ranks that share a sequence; every rank of the job, or of the mesh given, makes this call.

    parallel: a ContextParallel; "auto" for all ranks of the launcher or of the initialised default group; a
        torch DeviceMesh (1-D, or with a dimension "cp" or "context", whose ranks are taken), an accelerate
        Accelerator or ParallelismConfig, or a process group; a Mesh, which is lent; None.
    device: where the model is. torch.distributed is initialised for it where nobody has.
    -> the mesh, or None where one process is alone.
    FarspanError: no launcher, a size that does not divide the job, a mesh without such a dimension, a device
        that is not there or shared, ranks whose configuration differs or that do not come.
    """
    if isinstance(parallel, Mesh):
        return dataclasses.replace(parallel, lent=True)
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
        f'parallel={parallel!r}: a farspan.ContextParallel, "auto", a torch DeviceMesh, an accelerate '
        "Accelerator or ParallelismConfig, or None is allowed."
    )


def _is_mesh(given: Any) -> bool:
    # accelerate's two are known by what they offer: it is not imported for that
    return isinstance(given, (DeviceMesh, dist.ProcessGroup)) or (
        hasattr(given, "torch_device_mesh") or hasattr(given, "get_device_mesh")
    )


# --- who is there ---------------------------------------------------------------------------------------


def _launched(config: ContextParallel) -> bool:
    """Whether a launcher has started this process among others (torchrun, accelerate, deepspeed: all of them
    set the same variables)."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        missing = [n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        if missing or not size.isdigit():
            raise FarspanError(
                f"WORLD_SIZE={size} is set, but {', '.join(missing) or 'it'} is not as a launcher sets it: "
                f"{_START}."
            )
        return True
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise FarspanError(
            f"srun has started {tasks} tasks, but none of them knows its peers: let srun start one torchrun "
            "per node (docs/MULTI_GPU.md)."
        )
    if config.size is not None:
        raise FarspanError(f"ContextParallel(size={config.size}) in a job of one process: {_START}.")
    return False


def _initialise(device: torch.device, timeout: float) -> None:
    if "WORLD_SIZE" not in os.environ:
        raise FarspanError(f"A mesh was given, but torch.distributed is not initialised: {_START}.")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise FarspanError(
                f"Rank {os.environ['RANK']} wants cuda:{index}, but {socket.gethostname()} has "
                f"{torch.cuda.device_count()} such devices: start at most one process per device "
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
    """-> the ranks of the job that make the same call, and those of them that share this rank's sequence."""
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
            f"ContextParallel(size={config.size}), but the mesh given has {len(mine)} ranks there."
        )
    if config.ulysses is not None and len(mine) % config.ulysses:
        raise FarspanError(
            f"ContextParallel(ulysses={config.ulysses}) does not divide the {len(mine)} ranks."
        )
    return members, mine


def _device_mesh(given: Any, device: torch.device) -> DeviceMesh:
    if isinstance(given, DeviceMesh):
        return given
    if not _is_mesh(given):
        raise SpecError(
            f"ContextParallel(mesh={given!r}): a torch DeviceMesh, accelerate's Accelerator or "
            "ParallelismConfig is allowed."
        )
    mesh = (
        given.torch_device_mesh if hasattr(given, "torch_device_mesh") else given.get_device_mesh(device.type)
    )
    if mesh is None:
        raise FarspanError(
            f"{type(given).__name__} has no device mesh: give it ParallelismConfig(cp_size=...)."
        )
    return mesh


def _column(mesh: DeviceMesh, rank: int) -> tuple[list[int], list[int]]:
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    found = [i for i, name in enumerate(names) if name in DIMENSIONS]
    if not found and mesh.ndim == 1 and names[0] not in ("tp", "pp", "ep", "dp"):
        found = [0]
    if not found:
        raise FarspanError(
            f"The mesh given has the dimensions {names}: name the one whose ranks share a sequence "
            '"cp" or "context".'
        )
    size = mesh.size(found[0])
    columns = mesh.mesh.movedim(found[0], -1).reshape(-1, size)
    mine = [column for column in columns.tolist() if rank in column]
    if not mine:
        raise FarspanError(f"Rank {rank} is not in the mesh given: {mesh.mesh.tolist()}.")
    return columns.flatten().tolist(), mine[0]


# --- coming together ------------------------------------------------------------------------------------


def _meet(
    config: ContextParallel, device: torch.device, members: list[int], mine: list[int], rank: int
) -> Mesh:
    store = c10d._get_default_store()
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "mesh"}
    inside = int(os.environ.get("LOCAL_WORLD_SIZE", len(mine)))
    says = {"options": options, "device": _identity(device), "inside": inside}
    place = f"farspan/{text_hash(repr(members)):x}"
    name, said = meet(store, place, members, rank, says, MEETING * config.timeout)
    _compare(said, members)
    inner = _ulysses_degree(config, [answer["inside"] for answer in said.values()])
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
            everyone, ulysses, ring = group("ranks", mine), None, None
            if inner is not None:
                at = mine.index(rank)
                ulysses = group("ulysses", mine[at // inner * inner :][:inner])
                ring = group("ring", mine[at % inner :: inner])
    except BaseException:
        watch.close()
        raise
    return Mesh(everyone, ulysses, ring, config, device, watch)


def _ulysses_degree(config: ContextParallel, local: list[int]) -> int | None:
    """local: ranks on the machine of each rank."""
    size = config.size or 1
    if config.ulysses is not None or config.mechanism != "usp":
        return config.ulysses
    inside = math.gcd(size, *local)
    if 1 < inside < size:
        return inside
    return max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)  # one machine, or one rank on each


def _identity(device: torch.device) -> str | None:
    """The accelerator, as no other one in the job is called; None for a CPU, which ranks may share."""
    if device.type != "cuda":
        return None
    return f"{device} of {socket.gethostname()} ({torch.cuda.get_device_properties(device).uuid})"


def _compare(said: dict[int, dict[str, Any]], members: list[int]) -> None:
    faults = []
    for option in said[members[0]]["options"]:
        values = [repr(said[r]["options"].get(option)) for r in members]
        if odd := minority(values):
            those = f"{values[odd[0]]} on {named([members[i] for i in odd])}"
            others = next(v for i, v in enumerate(values) if i not in odd)
            faults.append(f"{option} is {those} and {others} on the others")
    if faults:
        raise FarspanError(f"The ranks have different ContextParallel configurations: {'; '.join(faults)}.")
    places: dict[str, int] = {}
    for r in members:
        device = said[r]["device"]
        if device is not None and device in places:
            raise FarspanError(
                f"{named([places[device], r]).capitalize()} both have their model on {device}: load it on "
                "f\"cuda:{os.environ['LOCAL_RANK']}\", each rank its own device."
            )
        places[device] = r
