"""Ranks started as users start them: processes of their own that run a script, alone or under a launcher."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """A process that has ended: exit status, what it wrote, seconds since the start of all."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """What it said in farspan's name."""
        lines = self.err.splitlines()
        return [line.removeprefix("farspan: ") for line in lines if line.startswith("farspan: ")]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what another launcher or the tests' own workers have left in it."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks(size: int, script: str, *arguments: str, within: float = 40) -> list[Ended]:
    """``script`` of this folder run by ``size`` processes, with the environment every launcher sets.

    All must end ``within`` seconds, else TimeoutError. A stopped process counts as ended when it is alone; it
    is killed then.
    """
    port, began = str(free_port()), time.monotonic()
    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        _start(
            [sys.executable, str(HERE / script), *arguments],
            environment(**job, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(size)
    ]
    return _wait(processes, began, within)


def commands(*lines: list[str], within: float = 120, **more: str) -> list[Ended]:
    """Commands started together; all must end ``within`` seconds, else TimeoutError."""
    began = time.monotonic()
    return _wait([_start(line, environment(**more)) for line in lines], began, within)


def here(arguments: list[str]) -> Ended:
    """The `farspan` command in this process, on one thread as processes of their own have it."""
    import torch

    from farspan.cli import main

    threads, began, code = torch.get_num_threads(), time.monotonic(), 0
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            torch.set_num_threads(threads)
    return Ended(code, out.getvalue(), err.getvalue(), time.monotonic() - began)


def _start(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    # a session of its own, so that a launcher's children can be ended with it
    return subprocess.Popen(
        command,
        env=env,
        cwd=HERE,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _wait(processes: list[subprocess.Popen[str]], began: float, within: float) -> list[Ended]:
    ends: dict[int, float] = {}
    late = False
    while len(ends) < len(processes) and not late:
        time.sleep(0.02)
        now = time.monotonic() - began
        for i, process in enumerate(processes):
            if i not in ends and process.poll() is not None:
                ends[i] = now
        alive = [process for i, process in enumerate(processes) if i not in ends]
        if ends and len(alive) == 1 and _stopped(alive[0]):
            break
        late = now > within
    for process in processes:
        _kill(process)
    ended = []
    for i, process in enumerate(processes):
        out, err = process.communicate()  # a few lines each: no pipe fills up before
        ended.append(Ended(process.returncode, out, err, ends.get(i, float("inf"))))
    if late:
        raise TimeoutError(f"not all have ended within {within} s: {ended}")
    return ended


def _stopped(process: subprocess.Popen[str]) -> bool:
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
