"""Ranks find each other, know who shares their sequence, and notice when they do not agree."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from farspan.attention.errors import FarspanError, SpecError
from farspan.parallel.group.config import ContextParallel
from farspan.parallel.group.digest import bit_hash, minority, text_hash
from farspan.parallel.group.join import join
from farspan.parallel.group.meeting import meet

from .world import World

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


# --- the configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"size": 0}, r"size=0\): a whole number of at least 1, or None, is allowed"),
        ({"size": 2.0}, r"size=2\.0"),
        ({"size": True}, "size=True"),
        ({"block": None}, r"block=None\): a whole number of at least 1, is allowed"),
        ({"mechanism": "rings"}, "mechanism='rings'.*auto, gather, ring, ulysses, usp, pass_q"),
        ({"backend": "nccl"}, "backend='nccl'.*torch, deepspeed"),
        ({"timeout": 0}, r"timeout=0\): a number of seconds above 0"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"check": 1}, "check=1"),
        ({"size": 6, "mechanism": "usp", "ulysses": 4}, "ulysses=4.*a divisor of size=6"),
        ({"mechanism": "ring", "ulysses": 2}, "ulysses=2.*usp.*'ring'"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(wrong: dict[str, Any], said: str):
    with pytest.raises(SpecError, match=said):
        ContextParallel(**wrong)


# --- one process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [None, "auto", ContextParallel(), ContextParallel(size=1)])
def test_one_process_alone_needs_no_mesh(parallel: Any):
    assert join(parallel, "cpu") is None


@pytest.mark.parametrize(
    ("parallel", "environment", "said"),
    [
        ("yes", {}, "parallel='yes'"),
        (ContextParallel(size=8), {}, r"size=8\) in a job of one process; .*torchrun"),
        ("auto", {"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 is set, but MASTER_ADDR, MASTER_PORT"),
        ("auto", {"SLURM_STEP_NUM_TASKS": "4"}, "srun has started 4 tasks"),
    ],
)
def test_what_cannot_be_joined_is_one_sentence(
    parallel: Any, environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FarspanError, match=said):
        join(parallel, "cpu")


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch):
    job = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(FarspanError, match=r"Rank 1 wants cuda:1, but .* has 1 such devices"):
        join("auto", "cuda")


# --- several ----------------------------------------------------------------------------------------------


def meet_and_agree(group: Any) -> list[int]:
    for _ in range(2):  # again after a close, under the same ranks
        mesh = join(ContextParallel(mesh=group, timeout=20), "cpu")
        assert mesh is not None and mesh.config.size == mesh.size == group.size()
        mesh.agree({"ids": torch.arange(7), "k": 3, "name": "a", "none": None})
        mesh.close()
    with pytest.raises(FarspanError, match="has been closed"):
        mesh.agree({})
    return mesh.ranks.sent["agree"]


def lend(group: Any) -> None:
    mesh = join(group, "cpu")
    assert mesh is not None
    for _ in range(2):  # a patch after another
        lent = join(mesh, "cpu")
        assert lent is not None
        lent.agree({"x": 1})
        lent.close()
    assert mesh.ranks.calls["agree"] == 2
    mesh.close()
    with pytest.raises(FarspanError, match="has been closed"):
        lent.agree({"x": 1})


def test_a_mesh_is_lent_to_whom_it_is_given(world: World):
    world.run(lend, 2)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_meet_agree_and_leave(world: World, size: int):
    assert world.run(meet_and_agree, size) == [(size - 1) * 128] * size


def disagree(group: Any) -> list[str]:
    mesh = join(group, "cpu")
    assert mesh is not None
    r, last = mesh.rank, mesh.size - 1
    ids = torch.tensor([[5, 6, 7]])
    cases: list[dict[str, Any]] = [
        {"ids": ids + (r == last)},
        {"ids": ids if r < last else ids[:, [0, 2, 1]]},  # the same numbers in another order
        {"ids": ids if r < last else ids.view(3, 1)},
        {"x": torch.zeros(2) if r < last else torch.zeros(2, dtype=torch.int32)},
        {"x": torch.tensor(0.0 if r < last else -0.0)},  # equal values, other bits
        {"x": None if r < last else "None", "y": 4},
        {"x": 1, "y": r if r < 1 else 1, "z": "a" if r < last else "b"},
        {"x" if r < last else "y": 1},
    ]
    said = []
    for values in cases:
        with pytest.raises(FarspanError) as caught:
            mesh.agree(values)
        said.append(str(caught.value))
    mesh.agree({"x": torch.tensor([float("nan")])})  # the group is as good as before
    mesh.close()
    return said


def test_what_differs_and_where_is_said_on_every_rank(world: World):
    said = world.run(disagree, 3)
    assert said[0] == said[1] == said[2]
    names = [text.partition(": ")[2].partition(".")[0] for text in said[0][:-1]]
    assert names == [*["ids on rank 2"] * 3, *["x on rank 2"] * 3, "y on rank 0, z on rank 2"]
    assert said[0][-1].startswith("Rank 2 came to another step")


def test_two_ranks_that_differ_are_judged_by_the_first(world: World):
    said = world.run(disagree, 2)
    assert said[0] == said[1]
    assert "ids on rank 1" in said[0][0] and "y on rank 1, z on rank 1" in said[0][6]


def other_configurations(group: Any) -> str:
    mechanism = "ring" if group.rank() == 1 else "gather"
    with pytest.raises(FarspanError) as caught:
        join(ContextParallel(mesh=group, mechanism=mechanism), "cpu")
    return str(caught.value)


def test_other_configurations_are_found_before_any_collective(world: World):
    for said in world.run(other_configurations, 3):
        assert "mechanism is 'ring' on rank 1 and 'gather' on the others" in said


def many_meetings(group: Any) -> list[str]:
    chance = random.Random(group.rank())
    store = distributed_c10d._get_default_store()
    names = []
    for i in range(50):
        time.sleep(chance.random() / 50)
        name, said = meet(store, "test/meeting", [2, 0, 1, 3], group.rank(), i, 20)
        assert said == dict.fromkeys(range(4), i)
        names.append(name)
    return names


def test_meetings_one_after_another_are_not_taken_for_each_other(world: World):
    names = world.run(many_meetings, 4)
    assert names[0] == names[1] == names[2] == names[3] and len(set(names[0])) == 50


def all_but_one_come(group: Any) -> str:
    said = ""
    if group.rank() == 1:
        time.sleep(3)
    else:
        with pytest.raises(FarspanError) as caught:
            join(ContextParallel(mesh=group, timeout=0.1), "cpu")
        said = str(caught.value)
    mesh = join(group, "cpu")  # and now all of them
    assert mesh is not None
    mesh.agree({"x": 1})
    mesh.close()
    return said


def test_a_rank_that_does_not_come_is_named(world: World):
    said = world.run(all_but_one_come, 3)
    assert said[0] == said[2] and said[0].startswith("Rank 1 did not come within 1 s")


def who(mesh: Any) -> dict[str, Any]:
    """Global ranks of the groups this rank is in."""

    def of(ranks: Any) -> Any:
        return ranks and [ranks.global_rank(i) for i in range(ranks.size)]

    return {"ranks": of(mesh.ranks), "ulysses": of(mesh.ulysses), "ring": of(mesh.ring)}


def two_dimensional(group: Any, ulysses: int | None) -> dict[str, Any]:
    mesh = join(ContextParallel(mesh=group, mechanism="usp", ulysses=ulysses), "cpu")
    assert mesh is not None and mesh.ulysses is not None and mesh.ring is not None
    inner = mesh.ulysses.all_gather(torch.tensor(mesh.rank)).tolist()
    across = mesh.ring.all_gather(torch.tensor(mesh.rank)).tolist()
    groups = who(mesh)
    assert (inner, across) == (groups["ulysses"], groups["ring"])
    mesh.close()
    return groups


def test_usp_groups_are_neighbours_and_those_across(world: World):
    groups = world.run(two_dimensional, 4, None)  # on one machine: 2 x 2
    assert [g["ulysses"] for g in groups] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g["ring"] for g in groups] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    groups = world.run(two_dimensional, 4, 4)
    assert [g["ring"] for g in groups] == [[0], [1], [2], [3]]
    groups = world.run(two_dimensional, 3, 1)
    assert [g["ulysses"] for g in groups] == [[0], [1], [2]]


def replicas_and_sizes(_: Any) -> dict[str, Any]:
    mesh = join(ContextParallel(size=2), "cpu")
    assert mesh is not None
    with pytest.raises(FarspanError, match=r"size=3\) in a job of 4 ranks: .*start 3 of them"):
        join(ContextParallel(size=3), "cpu")
    mesh.agree({"replica": torch.distributed.get_rank() // 2})
    mesh.close()
    return {"size": mesh.config.size, **who(mesh)}


def test_a_smaller_size_makes_replicas(world: World):
    got = world.run(replicas_and_sizes, 4)
    assert [g["ranks"] for g in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g["size"] for g in got] == [2] * 4


def device_meshes(_: Any) -> dict[str, Any]:
    from accelerate import ParallelismConfig
    from torch.distributed.device_mesh import init_device_mesh

    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    plain = init_device_mesh("cpu", (4,))
    unnamed = init_device_mesh("cpu", (2, 2))
    accelerate = ParallelismConfig(cp_size=2, tp_size=2)
    found = {}
    for name, given in {
        "both": both,
        "its cp": both["cp"],
        "plain": plain,
        "accelerate": accelerate,
        "in a configuration": ContextParallel(mesh=both, size=2),
    }.items():
        mesh = join(given, "cpu")
        assert mesh is not None
        found[name] = who(mesh)["ranks"]
        mesh.agree({"same": 1})
        mesh.close()
    for given, said in [
        (unnamed, 'name the one whose ranks share a sequence "cp"'),
        (both["tp"], "dimensions"),
        (ContextParallel(mesh=both, size=4), r"size=4\) was given with a mesh of 2 ranks"),
        (ContextParallel(mesh=both, mechanism="usp", ulysses=4), "ulysses=4.*2 ranks"),
        (ContextParallel(mesh="cp"), "mesh='cp'"),
        (ParallelismConfig(), "no device mesh"),
    ]:
        with pytest.raises(FarspanError, match=said):
            join(given, "cpu")
    return found


def test_device_meshes_and_accelerate(world: World):
    rows = {"plain": [[0, 1, 2, 3]] * 4}
    for rank, found in enumerate(world.run(device_meshes, 4)):
        for name, ranks in found.items():
            assert ranks == rows.get(name, [[0, 2], [1, 3], [0, 2], [1, 3]])[rank], name


# --- hashes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("length", [0, 1, 5, 63, 1000])
def test_one_bit_or_two_places_change_the_hash(dtype: torch.dtype, length: int):
    generator = torch.Generator().manual_seed(length)
    raw = torch.randint(0, 2 if dtype == torch.bool else 255, (length * dtype.itemsize,), generator=generator)
    x = raw.to(torch.uint8).view(dtype)
    same = torch.cat([x[:1], x])[1:] if length else x.clone()  # other storage, other alignment
    assert bit_hash(x).item() == bit_hash(same).item()
    hashes = {bit_hash(x).item()}
    places = torch.randperm(len(raw), generator=generator)[:50].tolist()
    for place in places:
        other = x.clone()
        other.view(torch.uint8)[place] ^= 1
        hashes.add(bit_hash(other).item())
    assert len(hashes) == 1 + len(places)


def test_sign_flips_in_two_places_do_not_cancel():
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    hashes = set()
    for i in range(64):
        for j in range(i, 64):
            y = x.clone()
            y[i], y[j] = -y[i], -y[j]
            hashes.add(bit_hash(y).item())
    assert len(hashes) == 64 + 63 * 32


def test_long_tensors_are_hashed_in_pieces_as_one(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(10_001)
    whole = bit_hash(x).item()
    monkeypatch.setattr("farspan.parallel.group.digest._PIECE", 64)
    assert bit_hash(x).item() == whole


def test_bit_hash_by_hand():
    def splitmix64(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    words = [3, 2**64 - 5, 2**63]
    signed = [w - 2**64 if w >= 2**63 else w for w in words]
    total = sum(splitmix64((w + i * 0x9E3779B97F4A7C15) % 2**64) for i, w in enumerate(words))
    assert bit_hash(torch.tensor(signed)).item() % 2**64 == total % 2**64


def test_minority():
    assert minority([4, 4, 4]) == []
    assert minority([4, 5, 5]) == [0]
    assert minority([4, 5]) == [1]
    assert minority([6, 5, 5, 4, 4, 6]) == [1, 2, 3, 4]
    assert text_hash("a") != text_hash("b")
