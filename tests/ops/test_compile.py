"""The kernels compile for the GPU they are meant for, and fit it, where there is no GPU to run them on."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "compile_sm90.json"  # python -m benchmarks.compile --save
CASES = [  # of benchmarks.compile
    *(
        (op, "bfloat16", 128)
        for op in ("append", "block_max", "block_sparse", "decode", "estimate_topk", "flash")
    ),
    *((op, "bfloat16", 128) for op in ("gather_decode", "int4_scores", "pool", "scores")),
    ("scan", "bfloat16", 64),
    ("select", "float32", 0),
]
SHARED = 227 * 1024  # bytes that a program may have on Hopper
SPILLED = 64  # bytes a thread, stores and loads together: a few registers
KNOWN = {  # kernel and head size -> what the worst form in the table spills; it may not become more
    ("_flash", 80): 104,
    ("_forward", 80): 80,
    ("_forward", 128): 80,
    ("_sweep", 256): 168,
    ("_walk", 256): 352,
}


def has_nvidia_backend() -> bool:
    """Whether triton is here, and with it the compiler of its NVIDIA backend."""
    triton = pytest.importorskip("triton")
    return (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()


def launched_kernels() -> set[tuple[str, str]]:
    """(operation, name) of the Triton kernels under attention/ops: functions that ask for their program and
    that no other one calls. Operation is "" for what operations share."""
    found, called, ops = set(), set(), ROOT / "attention" / "ops"
    for path in ops.rglob("*.py"):
        *op, _ = path.relative_to(ops).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            decorators = " ".join(map(ast.unparse, getattr(node, "decorator_list", [])))
            if isinstance(node, ast.FunctionDef) and "triton.jit" in decorators:
                of = op[0] if op else ""
                inner = [x.func for x in ast.walk(node) if isinstance(x, ast.Call)]
                called |= {(of, x.id) for x in inner if isinstance(x, ast.Name)}
                if "tl.program_id" in ast.unparse(node):
                    found.add((of, node.name))
    return found - called


def assert_fits(row: dict[str, Any], spilled: int = SPILLED) -> None:
    assert 0 < row["registers"] <= 255, row
    assert row["spilled"] <= spilled, row
    assert row["shared"] <= SHARED, row


def test_the_table_has_every_kernel_and_they_fit_hopper() -> None:
    """In every dtype, for every size of heads, in every form that the autotuner may take."""
    rows = json.loads(TABLE.read_text())["rows"]
    compiled_ones = {(op, row["kernel"]) for row in rows for op in ("", row["op"])}
    kernels = launched_kernels()
    assert len(kernels) > 20 and kernels - compiled_ones == set()
    heads = set(itertools.product(("bfloat16", "float16"), (64, 80, 128, 256)))
    for op in {row["op"] for row in rows}:
        found = {(row["dtype"], row["D"]) for row in rows if row["op"] == op}
        assert found == ({("float32", 0)} if op == "select" else heads), op
    for row in rows:
        assert_fits(row, KNOWN.get((row["kernel"], row["D"]), SPILLED))


def compiled(op: str, dtype: str, d: int) -> list[dict[str, Any]]:
    """The programs of an operation as they are launched first."""
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
    return rows


def test_a_sample_fits_hopper() -> None:
    for row in compiled("gather_decode", "float16", 80):
        assert row["first"]
        assert_fits(row)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "dtype", "d"), CASES, ids=lambda x: str(x))
def test_kernels_fit_hopper(op: str, dtype: str, d: int) -> None:
    """As they are launched first: registers suffice, and so does shared memory."""
    for row in compiled(op, dtype, d):
        assert_fits(row)
