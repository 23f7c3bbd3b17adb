"""The kernels compile for the GPU they are meant for, and fit it, where there is no GPU to run them on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [  # of benchmarks.compile
    *(
        (op, "bfloat16", 128)
        for op in ("append", "block_max", "block_sparse", "decode", "estimate_topk", "flash")
    ),
    *((op, "bfloat16", 128) for op in ("gather_decode", "int4_scores", "pool", "scores")),
    ("scan", "bfloat16", 64),
    ("select", "float32", 64),
]
SHARED = 227 * 1024  # bytes that a program may have on Hopper
SPILLED = 64  # bytes a thread, stores and loads together: none under triton 3.9, a few registers under 3.6


def has_nvidia_backend() -> bool:
    """Whether triton is here, and with it the compiler of its NVIDIA backend."""
    triton = pytest.importorskip("triton")
    return (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("op", "dtype", "d"), CASES, ids=lambda x: str(x))
def test_kernels_fit_hopper(op: str, dtype: str, d: int) -> None:
    """As they are launched first: registers suffice, and so does shared memory."""
    if not has_nvidia_backend():
        pytest.skip("this triton has no NVIDIA backend")
    # In a process of its own: in this one triton may be its interpreter.
    code = (
        "import json; from benchmarks.compile import compile_all; "
        f"print(json.dumps(compile_all(90, [{op!r}], [{dtype!r}], [{d}])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows and {row["op"] for row in rows} == {op}
    for row in rows:
        assert 0 < row["registers"] <= 255, row
        assert row["spilled"] <= SPILLED, row
        assert row["shared"] <= SHARED, row
