"""benchmarks/gpu.sh, which a GPU session runs, in its dry mode; and its summary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def session(tmp_path: Path, phase: str, **settings: str) -> tuple[int, str, list[str]]:
    """Run a phase from a copy of the checkout without git -> (exit code, what it printed, names of its
    results)."""
    copy = tmp_path / "checkout"
    leave = shutil.ignore_patterns(".*", "build", "docs", "*.egg-info", "__pycache__", "demo-out")
    if not copy.exists():
        shutil.copytree(ROOT, copy, ignore=leave)
    given = os.environ | {"DRY": "1", "PYTHON": sys.executable, "OUT": str(tmp_path / "out")} | settings
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", phase], cwd=copy, env=given, capture_output=True, text=True
    )
    packed = tmp_path / "out" / f"gpu_{phase}.tar.gz"
    if not packed.exists():
        return done.returncode, done.stdout + done.stderr, []
    with tarfile.open(packed) as results:
        return done.returncode, done.stdout + done.stderr, results.getnames()


def test_a_session_runs_packs_its_results_and_skips_what_does_not_fit(tmp_path: Path) -> None:
    code, said, names = session(tmp_path, "C")
    assert code == 0 and "tuned: exit 0" in said, said
    assert {"results/summary.md", "results/stages.txt", "results/tuned.log"} <= set(names)
    code, said, names = session(tmp_path, "C", SECONDS_IN_ALL="5")
    assert code == 1 and "tuned: skipped, 5 s are left of the 120 that it may take" in said
    assert "results/summary.md" in names
    code, said, _ = session(tmp_path, "D")
    assert code == 2 and "has the phases A, B and C; got D" in said


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["A", "B"])
def test_every_stage_runs(tmp_path: Path, phase: str) -> None:
    code, said, names = session(tmp_path, phase)
    assert code == 0, said
    assert sum(name.endswith(".json") for name in names) >= 3


def test_the_summary_sets_goals_beside_results(tmp_path: Path) -> None:
    ours = {"role": "ours", "length": 65536, "at": "10 %"}
    rows = [
        {"op": "block_sparse", "run": "block_sparse", "density": 0.1, "x dense": 8.0, "of copy": 0.1, **ours},
        {"op": "gather_decode", "run": "gather_decode", "x dense": 9.0, "of copy": 0.75, **ours},
        {"op": "gather_decode", "run": "quest + gather_decode", "x dense": 4.5, "of copy": 0.2, **ours},
        {"op": "gather_decode", "run": "sdpa", "role": "dense", "length": 65536, "at": "", "x dense": 1.0},
    ]
    (tmp_path / "ops_cuda.json").write_text(json.dumps({"machine": {"device": "H200"}, "rows": rows}))
    scans = [{"run": "ssd", "length": 8192, "impl": "triton", "x dense": 3.0, "x fla": 0.9}]
    (tmp_path / "scan_cuda.json").write_text(json.dumps({"machine": {}, "rows": scans}))
    step = {"method": "unpatched", "tokens": 131072, "launches a layer": 14.0, "ms a token": 21.0}
    steps = [step, {**step, "method": "dense", "launches a layer": 12.5}]
    (tmp_path / "launches.json").write_text(json.dumps({"machine": {}, "rows": steps}))
    asked = [sys.executable, "-m", "benchmarks.gpu_summary", str(tmp_path)]
    text = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in (
        "| block_sparse, 65,536 tokens, 10 %, time over density x dense | <= 1.25 | 1.5 to 1.65 | 1.25 |",
        "| gather_decode, 65,536 keys, 10 %, share of copy bandwidth | >= 0.70 | 0.60 to 0.68 | 0.75 |",
        "| gather_decode, 65,536 keys, 10 %, x dense | >= 8 |  | 9.0 |",
        "| quest + gather_decode, 65,536 keys, 10 %, x dense | >= 4 | 4 to 5 | 4.5 |",
        "| unpatched, 131,072 tokens, ms a token |  | 20 to 25 (8B, 131,072 tokens, eager) | 21.0 |",
        "| dense, 131,072 tokens, launches of a layer and token beyond unpatched | <= 0 |  | -1.5 |",
        "| ssd, 8,192 tokens, x fla | >= 0.8 |  | 0.90 |",
    ):
        assert line in text, text
    assert "sdpa" not in text
