"""Energy: what the counters of the GPU (NVML) or of the processor's sockets (RAPL) say that a block has used.

Both count the whole device: other programs' work and what it draws when idle are in the number, the rest of the
machine is not. An empty machine and runs of some seconds in all are needed; NVIDIA's counter moves about ten times a
second.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
_POLL_SECONDS = 30.0  # a socket's counter wraps after some minutes of full load: it must be read more often


@dataclass
class Energy:
    """Energy that a block has used.

    Attributes:
        joules: None where the device does not tell.
        source: what was counted, or why nothing was.
    """

    joules: float | None = None
    source: str = ""


@contextmanager
def energy(device: torch.device, powercap: Path = POWERCAP) -> Iterator[Energy]:
    """Energy of the block.

    `with energy(pipe.device) as used: pipe(prompt)`, then `used.joules`. An NVIDIA GPU is asked by NVML (package
    `nvidia-ml-py`); the block must wait for the GPU before it ends. On the CPU the sockets and their memory are added
    up (Linux RAPL; most systems let only root read it). Elsewhere, and where nothing has moved, `joules` stays None.

    Args:
        device: what computes. Of a GPU's run only that GPU is counted, not the processor.
        powercap: folder of the RAPL counters.
    """
    used = Energy()
    if device.type == "cuda":
        before, used.source = _gpu_joules(device)
        yield used
        after, _ = _gpu_joules(device)
        used.joules = None if before is None or after is None else after - before
    elif device.type == "cpu":
        sockets = _Sockets(powercap)
        used.source = sockets.source
        with _polled(sockets):
            yield used
        used.joules = sockets.joules if sockets.counted else None
    else:
        used.source = f"no energy counter is known for {device.type}"
        yield used
    if used.joules == 0:
        used.joules, used.source = None, f"{used.source}: the counter did not move in so short a time"


def _gpu_joules(device: torch.device) -> tuple[float | None, str]:
    """Joules since the driver was loaded, or None; and where they come from, or why there are none."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None, "NVML needs nvidia-ml-py; pip install nvidia-ml-py"
    properties = torch.cuda.get_device_properties(device)
    try:
        pynvml.nvmlInit()
        try:
            # By UUID: NVML's numbers do not heed CUDA_VISIBLE_DEVICES.
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, f"NVML, {properties.name}"
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return None, f"NVML does not tell the energy of {properties.name}: {error}"


class _Sockets:
    """RAPL counters of all sockets and of memory, added up since this was made.

    Top-level zones are `package-N`, which hold `core` and `uncore`; `dram` inside them is counted apart from them.
    `psys` is the platform with all of them, and `intel-rapl-mmio` a second view of the packages: neither is added.
    """

    def __init__(self, powercap: Path) -> None:
        self.joules = 0.0
        self.counted = False
        self._last: dict[Path, int] = {}
        try:
            zones = {zone: (zone / "name").read_text().strip() for zone in sorted(powercap.glob("intel-rapl:*"))}
            names = {zone: name for zone, name in zones.items() if name == "dram" or name.startswith("package")}
            self._range = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in names}
            self._last = {zone: _microjoules(zone) for zone in names}
        except PermissionError:
            self.source = "RAPL counters are readable by root only"
            return
        except (OSError, ValueError) as error:
            self.source = f"RAPL counters cannot be read: {error}"
            return
        self.counted = bool(names)
        self.source = f"RAPL, {', '.join(names.values())}" if names else "this machine has no RAPL counters"

    def update(self) -> None:
        """Add what the counters have moved by since the last time; each may have wrapped once."""
        for zone, last in self._last.items():
            now = _microjoules(zone)
            self.joules += (now - last + (self._range[zone] if now < last else 0)) / 1e6
            self._last[zone] = now


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


@contextmanager
def _polled(sockets: _Sockets) -> Iterator[None]:
    """Updates the counters now and then, and at the end."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(_POLL_SECONDS):
            sockets.update()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sockets.update()
