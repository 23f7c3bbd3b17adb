"""Energy of a block, where the device counts it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from farspan.evals import energy as module
from farspan.evals.energy import energy


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(module, "RAPL", tmp_path)
    found = [tmp_path / f"intel-rapl:{i}" for i in range(2)]
    for package in found:
        package.mkdir()
        (package / "energy_uj").write_text("1000000")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0, which holds its energy too
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("7")
    return found


def test_the_packages_of_a_cpu_are_added(packages: list[Path]) -> None:
    with energy(torch.device("cpu")) as used:
        assert used.joules is None
        (packages[0] / "energy_uj").write_text("3500000")
        (packages[1] / "energy_uj").write_text("1500000")
    assert used.joules == 3.0


def test_a_counter_that_cannot_be_read_or_began_anew_is_no_number(packages: list[Path]) -> None:
    with energy(torch.device("cpu")) as used:
        (packages[0] / "energy_uj").write_text("5")
    assert used.joules is None
    (packages[1] / "energy_uj").unlink()
    (packages[1] / "energy_uj").mkdir()  # reading it fails, as without permission
    with energy(torch.device("cpu")) as used:
        pass
    assert used.joules is None


def test_a_cpu_without_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RAPL", tmp_path / "none")
    with energy(torch.device("cpu")) as used:
        pass
    assert used.joules is None


def test_a_gpus_counter_is_in_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([500, 1000, 251_000])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with energy(torch.device("cuda:0")) as used:
        pass
    assert used.joules == 250.0
