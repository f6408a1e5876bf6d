"""What connects the devices of this machine with each other and with other machines: NVLink as NVML tells, network cards as Linux does."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SYS = Path("/sys/class")
_NVML = "nvidia-ml-py"


@dataclass(frozen=True, slots=True)
class Card:
    """A network card that is connected: its name, its kind, and bytes a second each way, as the card says."""

    name: str
    kind: Literal["infiniband", "ethernet"]
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class NVLinks:
    """Active NVLinks of the first device; or, with `why_not`, why they cannot be counted and what to do about it."""

    count: int
    why_not: str = ""


def nvlinks() -> NVLinks:
    """Ask NVML, which torch does not need and may not be there."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return NVLinks(0, f"NVML's Python binding is not installed; pip install {_NVML}")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return NVLinks(0, f"NVML does not start ({error}); it comes with NVIDIA's driver")
    try:
        return NVLinks(_active(nvml, nvml.nvmlDeviceGetHandleByIndex(0)))
    except nvml.NVMLError as error:
        return NVLinks(0, f"NVML finds no device ({error})")
    finally:
        nvml.nvmlShutdown()


def _active(nvml: object, device: object) -> int:
    count = 0
    for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18)):
        try:
            count += nvml.nvmlDeviceGetNvLinkState(device, link) == nvml.NVML_FEATURE_ENABLED  # type: ignore[attr-defined]
        except nvml.NVMLError:  # type: ignore[attr-defined]
            break  # not supported, or no such link
    return count


def network_cards(root: Path = _SYS) -> tuple[Card, ...]:
    """Those that are up, by name: InfiniBand and RoCE ports, which GPUs use directly, then Ethernet of real hardware."""
    found = [Card(port.parent.parent.name, "infiniband", rate) for port in _sorted(root, "infiniband/*/ports/*") if (rate := _port(port))]
    return (*found, *(Card(device.name, "ethernet", rate) for device in _sorted(root, "net/*") if (rate := _ethernet(device))))


def _sorted(root: Path, pattern: str) -> list[Path]:
    return sorted(root.glob(pattern)) if root.is_dir() else []


def _port(port: Path) -> float:
    """`4: ACTIVE` and `400 Gb/sec (4X NDR)`."""
    if "ACTIVE" not in _read(port / "state"):
        return 0.0
    return _bytes_per_s(_read(port / "rate").partition(" ")[0], 1e9)


def _ethernet(device: Path) -> float:
    """Megabits a second, -1 where nothing is plugged in; a virtual device has no hardware behind it."""
    if not (device / "device").exists() or _read(device / "operstate") != "up":
        return 0.0
    return _bytes_per_s(_read(device / "speed"), 1e6)


def _bytes_per_s(number: str, bits: float) -> float:
    try:
        return max(0.0, float(number) * bits / 8)
    except ValueError:
        return 0.0


def _read(file: Path) -> str:
    """Empty for what cannot be read: a card that is down answers with an error."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
