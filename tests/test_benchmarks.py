"""benchmarks.ops: every case is made and called once at a small size, and the command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CASES = ("block_sparse", "decode", "gather_decode", "pool", "scores", "select", "block_max", "int4_scores")


def test_every_case_runs() -> None:
    """The command on lengths of 128 and 256, its results beside the tracked ones and removed again."""
    command = [sys.executable, "-m", "benchmarks.ops", "--ops", *CASES, "--lengths", "128,256"]
    small = ["--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--block", "32", "--tokens", "64"]
    written = ROOT / "benchmarks" / "results" / f"ops_cpu_{'_'.join(CASES)}_128_256.json"
    try:
        done = subprocess.run(
            [*command, *small, "--repeats", "1", "--densities", "0.25,1", "--json"],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout)
        assert json.loads(written.read_text()) == printed
    finally:
        written.unlink(missing_ok=True)
    rows = printed["rows"]
    assert {(row["op"], row["length"]) for row in rows} >= {(op, n) for op in CASES for n in (128, 256)}
    assert all(row["ms"] > 0 for row in rows)
    dense = [r for r in rows if r["run"] == "block_sparse" and r["at"] == "100 %"]
    assert dense and all(abs(r["density"] - 1) < 1e-9 for r in dense) and printed["break_even"]
    assert torch.__version__ == printed["machine"]["torch"]
