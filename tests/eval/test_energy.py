"""Energy: counters in a made-up folder and a made-up NVML, which move while the block runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffaccel.eval import energy as module
from diffaccel.eval.energy import energy

CPU = torch.device("cpu")
RANGE = 1_000_000  # microjoules after which a counter begins anew


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A machine with two sockets, memory beside the second, and the views that must not be added."""
    names = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:1": "package-1",
        "intel-rapl:1:0": "dram",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    for zone, name in names.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name + "\n")
        (tmp_path / zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
        count(tmp_path, zone, 900_000)
    (tmp_path / "intel-rapl").mkdir()  # the driver's own folder
    return tmp_path


def count(powercap: Path, zone: str, microjoules: int) -> None:
    scratch = powercap / zone / "scratch"
    scratch.write_text(f"{microjoules}\n")
    scratch.replace(powercap / zone / "energy_uj")  # a counter is never seen half written


def test_sockets_and_memory_are_added_and_nothing_twice(powercap: Path) -> None:
    with energy(CPU, powercap) as used:
        for zone, now in (("intel-rapl:0", 910_000), ("intel-rapl:1", 903_000), ("intel-rapl:1:0", 900_500)):
            count(powercap, zone, now)
        for zone in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
            count(powercap, zone, 999_999)
    assert used.joules == pytest.approx(0.0135)
    assert used.source == "RAPL, package-0, package-1, dram"


def test_a_counter_may_begin_anew(powercap: Path) -> None:
    with energy(CPU, powercap) as used:
        count(powercap, "intel-rapl:0", 50_000)
    assert used.joules == pytest.approx(0.15)


def test_long_blocks_are_polled(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.001)
    read: list[int] = []
    original = module._microjoules

    def microjoules(zone: Path) -> int:
        value = original(zone)
        if zone.name == "intel-rapl:0" and value not in read[-1:]:
            read.append(value)
        return value

    monkeypatch.setattr(module, "_microjoules", microjoules)
    with energy(CPU, powercap) as used:
        for now in (400_000, 950_000, 450_000):  # begins anew twice: from the ends alone .55 J, and one turn is lost
            count(powercap, "intel-rapl:0", now)
            deadline = time.monotonic() + 10
            while read[-1] != now and time.monotonic() < deadline:
                time.sleep(0.001)
    assert read == [900_000, 400_000, 950_000, 450_000]
    assert used.joules == pytest.approx(0.5 + 0.55 + 0.5)


def test_machines_that_do_not_tell(powercap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with energy(CPU, powercap) as still:
        pass
    assert (still.joules, "did not move" in still.source) == (None, True)
    with energy(CPU, tmp_path / "nothing") as none:
        pass
    assert (none.joules, none.source) == (None, "this machine has no RAPL counters")
    with energy(torch.device("mps")) as unknown:
        pass
    assert (unknown.joules, unknown.source) == (None, "no energy counter is known for mps")

    def refused(zone: Path) -> int:
        raise PermissionError

    monkeypatch.setattr(module, "_microjoules", refused)
    with energy(CPU, powercap) as forbidden:
        pass
    assert (forbidden.joules, forbidden.source) == (None, "RAPL counters are readable by root only")


class NVML:
    """The few functions of pynvml that are used, of one GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, telling: bool = True) -> None:
        self.millijoules, self.telling, self.sessions = 5_000_000, telling, 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.sessions += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.sessions -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if handle != "GPU-1234-5" or not self.telling:
            raise self.NVMLError("Not Supported")
        return self.millijoules


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    properties = SimpleNamespace(uuid="1234-5", name="a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda:0")


def test_the_gpu_is_asked_by_its_uuid(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml := NVML())
    with energy(gpu) as used:
        nvml.millijoules += 1_500
    assert (used.joules, used.source, nvml.sessions) == (1.5, "NVML, a GPU", 0)


def test_gpus_that_do_not_tell(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml := NVML(telling=False))
    with energy(gpu) as used:
        pass
    expected = "NVML does not tell the energy of a GPU: Not Supported"
    assert (used.joules, used.source, nvml.sessions) == (None, expected, 0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with energy(gpu) as used:
        pass
    assert (used.joules, used.source) == (None, "NVML needs nvidia-ml-py; pip install nvidia-ml-py")
