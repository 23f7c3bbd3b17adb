"""A rank that dies, stalls, fails or has other inputs ends all ranks soon, with a sentence that names it.

The ranks are processes of their own. Time is bounded from the fault on: the collective's timeout where one
must run out, and what the survivors need to find out who it was.
"""

from __future__ import annotations

import re
import sys

import pytest

from farspan.parallel.group.watch import ANSWER, GRACE, LINGER

from . import launch
from .script_faults import TIMEOUT

BUSY = 3.0  # seconds that a loaded test machine may add
AT_ONCE = BUSY + LINGER
FOUND_OUT = AT_ONCE + GRACE
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def seconds_to_the_end(ends: list[launch.Ended]) -> float:
    """From the fault until the last of those who were waiting has said its sentence."""
    times = dict(re.findall(r"^(\w+) ([\d.]+)$", "".join(end.out for end in ends), re.MULTILINE))
    last = max(float(t) for t in re.findall(r"^end ([\d.]+)$", "".join(e.out for e in ends), re.MULTILINE))
    return last - float(times["fault"])


def check(
    kind: str, rank: int, said: str, within: float, codes: dict[int, int] | None = None, size: int = 3
) -> None:
    """Every survivor of ``size`` ranks says ``said`` in one sentence and ends with 2, in time.

    codes: exit statuses of the ranks that do not survive.
    """
    ends = launch.ranks(size, "script_faults.py", kind, str(rank))
    codes = codes or {}
    for place, end in enumerate(ends):
        assert end.code == codes.get(place, 2), end
        if place not in codes:
            assert len(end.sentences) == 1 and re.search(said, end.sentences[0]), end
            assert "Traceback" not in end.err
    assert seconds_to_the_end(ends) < within


def test_a_rank_that_dies():
    check("exit", 1, r"Rank 1 has died without a word .* all_gather \(collective 6\)", FOUND_OUT, {1: 1})


def test_rank_0_dies_and_the_store_with_it():
    check("exit", 0, r"Rank 0 has died", FOUND_OUT + ANSWER, {0: 1})


def test_a_rank_that_is_stopped():
    check("stop", 2, r"Rank 2 has stalled: no heartbeat.* within 3 s", TIMEOUT + FOUND_OUT, {2: -9})


def test_out_of_memory_is_said_by_all():
    check("memory", 1, r"Rank 1 ran out of memory \(CUDA out of memory\. Tried to allocate 2", AT_ONCE)


def test_other_inputs_are_said_by_all():
    check("inputs", 2, "input_ids on rank 2", AT_ONCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank", "said", "within", "codes"),
    [
        ("none", 0, "", 0.0, {0: 0, 1: 0, 2: 0}),
        ("kill", 2, "Rank 2 has died", FOUND_OUT, {2: -9}),
        ("terminate", 1, "Rank 1 has died", FOUND_OUT, {1: -15}),
        ("stop", 0, "Rank 0 has stalled", TIMEOUT + FOUND_OUT + ANSWER, {0: -9}),
        (
            "late",
            1,
            r"Rank 1 has stalled: alive.* last was all_gather \(collective 5\)",
            3 * TIMEOUT + BUSY,
            {},
        ),
        ("late", 0, "Rank 0 has stalled: alive", 3 * TIMEOUT + BUSY, {}),
        ("memory", 0, "Rank 0 ran out of memory", AT_ONCE, {}),
        ("cpu memory", 2, "Rank 2 ran out of memory .*allocate", AT_ONCE, {}),
        ("error", 1, "Rank 1 failed, .* KeyError: 'layer 7'", AT_ONCE, {}),
        ("input", 1, r"(Rank 1 failed, .*: )?A prompt must not be empty\.", FOUND_OUT, {}),
        ("leave", 1, "Rank 1 has ended .* its own output says why", FOUND_OUT, {1: 5}),
        ("leave", 0, "Rank 0 has (died or )?ended", FOUND_OUT + ANSWER, {0: 5}),
    ],
)
def test_other_faults(kind: str, rank: int, said: str, within: float, codes: dict[int, int]):
    if kind == "none":
        assert [end.code for end in launch.ranks(3, "script_faults.py", kind, "0")] == [0, 0, 0]
    else:
        check(kind, rank, said, within, codes)


@pytest.mark.slow
def test_a_rank_that_dies_in_tensor_parallelism():
    check("beside", 3, "Rank 3 has died", FOUND_OUT, {3: 1}, size=4)


# --- under the launchers ------------------------------------------------------------------------------------


def script(name: str) -> str:
    return str(launch.HERE / name)


def heard(ends: list[launch.Ended], size: int) -> None:
    everyone = list(range(size))
    said = sorted(re.findall(r"rank \d+ heard .*? of \d+", "".join(end.out + end.err for end in ends)))
    assert said == [f"rank {rank} heard {everyone} of {size}" for rank in everyone], ends
    assert [end.code for end in ends] == [0] * len(ends)


@pytest.mark.slow
def test_torchrun_ends_with_the_rank_named():
    run = [*TORCHRUN, "--nproc-per-node", "3", script("script_faults.py")]
    (memory,) = launch.commands([*run, "memory", "1"])
    assert memory.code != 0
    assert sum(s.startswith("Rank 1 ran out of memory") for s in memory.sentences) == 3
    (death,) = launch.commands([*run, "exit", "1"])
    assert death.code != 0 and re.search(r"rank +: 1 ", death.err)  # torchrun's own report


@pytest.mark.slow
def test_a_restarted_job_meets_again():
    run = [*TORCHRUN, "--nproc-per-node", "3", "--max-restarts", "1", script("script_faults.py")]
    (end,) = launch.commands([*run, "first try", "1"])
    assert end.code == 0 and end.out.count("fault") == 2, end


@pytest.mark.slow
def test_two_agents_form_one_group():
    port = launch.free_port()
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "farspan"]
    agent = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "2", *meeting, script("script_gather.py")]
    heard(launch.commands(agent, agent), 4)


@pytest.mark.slow
def test_accelerate_launch():
    line = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    line += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    line += ["--main_process_port", str(launch.free_port()), script("script_gather.py"), "accelerate"]
    heard(launch.commands(line), 2)


@pytest.mark.slow
def test_deepspeed_launcher():
    pytest.importorskip("deepspeed")
    line = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    line += ["--master_port", str(launch.free_port()), script("script_gather.py")]
    heard(launch.commands(line, DS_ACCELERATOR="cpu"), 2)
