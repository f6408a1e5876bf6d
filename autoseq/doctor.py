"""What `autoseq doctor` finds: versions, devices, ways to communicate, links and attention kernels, or why they are not there.

Nothing is run on a device and no package is imported but torch and, if they are there, NVML's and flash-attn, whose import may fail.
"""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata

import torch
import torch.cuda.nccl
import torch.distributed
from rich.console import Console

from autoseq.planning.links import Card, network_cards, nvlinks
from autoseq.printing import table
from autoseq.readable import readable_bytes
from autoseq.runtime import fused
from autoseq.runtime.kernel_call import BlockCall, Kernel
from autoseq.runtime.kernels import KERNELS

_PACKAGES = ("torch", "triton", "flash-attn", "transformers")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that autoseq may use: what it is, and why it is not available ("" if it is) with what to do about that."""

    name: str
    about: str
    why_not: str


@dataclass(frozen=True, slots=True)
class Device:
    """A device that torch can compute on. A CPU has no capability."""

    name: str
    kind: str
    capability: tuple[int, int] | None
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Checkup:
    """All findings. A version is None where something is not installed or not part of this build."""

    versions: dict[str, str | None]
    devices: list[Device]
    communication: list[Finding]
    links: list[Finding]
    kernels: list[Finding]


def checkup() -> Checkup:
    """Look at this installation."""
    devices = _devices()
    return Checkup(_versions(), devices, _communication(), _links(devices), [*_kernels(devices), _fused(devices)])


def checkup_json(found: Checkup) -> str:
    """One object, as documented: scripts may rely on these names."""
    return json.dumps({
        "versions": found.versions,
        "devices": [asdict(device) for device in found.devices],
        "communication": [_finding_json(finding) for finding in found.communication],
        "links": [_finding_json(finding) for finding in found.links],
        "kernels": [_finding_json(finding) for finding in found.kernels],
    })  # fmt: skip


def print_checkup(console: Console, found: Checkup) -> None:
    """Tables of everything; what is not there says why."""
    console.print(table("Versions", ("what", "version"), [(name, version or "not there") for name, version in found.versions.items()]))
    console.print(table("Devices", ("device", "kind", "capability", ":memory"), [_device_row(device) for device in found.devices]))
    parts = {
        "Communication": found.communication,
        "Links, which `autoseq topology measure` times": found.links,
        "Attention kernels, in the order they are tried": found.kernels,
    }
    for title, findings in parts.items():
        rows = [(each.name, each.about, "no" if each.why_not else "yes", each.why_not) for each in findings]
        console.print(table(title, ("name", "what it is", "available", "why not"), rows))


def _versions() -> dict[str, str | None]:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    parts = {"CUDA": torch.version.cuda, "cuDNN": cudnn and str(cudnn), "NCCL": nccl}
    return {"autoseq": _version("autoseq"), "python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}, **parts}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[Device]:
    cpu = Device(f"{os.cpu_count()} x {platform.machine()}", "cpu", None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [cpu, *(_cuda_device(torch.cuda.get_device_properties(i)) for i in range(count))]


def _cuda_device(found: "torch._C._CudaDeviceProperties") -> Device:
    return Device(found.name, "cuda", (found.major, found.minor), found.total_memory)


def _communication() -> list[Finding]:
    if not torch.distributed.is_available():
        why = "this build of torch has no torch.distributed; install one from pytorch.org"
        return [Finding("gloo", "between CPUs", why), Finding("nccl", "between CUDA devices", why)]
    gloo = "" if torch.distributed.is_gloo_available() else "this build of torch has no gloo; install one from pytorch.org"
    nccl = "" if torch.distributed.is_nccl_available() else "this build of torch has no NCCL; CUDA builds for Linux have it"
    if not nccl and not torch.cuda.is_available():
        nccl = "torch finds no CUDA device"
    return [Finding("gloo", "between CPUs", gloo), Finding("nccl", "between CUDA devices", nccl)]


def _links(devices: Sequence[Device]) -> list[Finding]:
    """Between the devices of this machine, and to other machines."""
    count = sum(device.kind == "cuda" for device in devices)
    nvlink, cards = nvlinks(), network_cards()
    why = nvlink.why_not or ("" if nvlink.count else "the first device has no active NVLink; messages go over PCI Express")
    about = f"{nvlink.count} active links of the first device" if nvlink.count else "between CUDA devices of a node"
    return [
        Finding("nvlink", about, why if count > 1 else _too_few(count)),
        Finding("peer access", "from device to device over PCI Express or NVLink", _no_peers(count)),
        _card(cards, "infiniband"),
        _card(cards, "ethernet"),
    ]


def _too_few(count: int) -> str:
    return "torch finds one CUDA device" if count else "torch finds no CUDA device"


def _no_peers(count: int) -> str:
    if count < 2:
        return _too_few(count)
    if all(torch.cuda.can_device_access_peer(0, other) for other in range(1, count)):
        return ""
    return "the driver does not let all devices read each other; messages go through the host's memory"


def _card(cards: Sequence[Card], kind: str) -> Finding:
    ours = [card for card in cards if card.kind == kind]
    found = ", ".join(f"{card.name} {8 * card.bytes_per_s / 1e9:g} Gb/s" for card in ours)
    lacking = {
        "infiniband": "no active InfiniBand or RoCE port, so NCCL uses sockets between nodes; such a card needs its driver and rdma-core",
        "ethernet": "no network card is up; a container may hide them",
    }
    about = {"infiniband": "between nodes, InfiniBand or RoCE, which NCCL uses directly", "ethernet": "between nodes, sockets"}
    return Finding(kind, about[kind] + (f": {found}" if found else ""), "" if ours else lacking[kind])


def _kernels(devices: Sequence[Device]) -> list[Finding]:
    return [Finding(kernel.name, kernel.about, kernel.missing() or _idle(kernel, devices)) for kernel in KERNELS]


def _idle(kernel: Kernel, devices: Iterable[Device]) -> str:
    """Why a kernel that is there computes nothing on any device: of the last one, for a plain block in bfloat16."""
    why = ""
    for device in devices:
        call = BlockCall(device.kind, device.capability or (0, 0), torch.bfloat16, 512, 512, 64, 64, "none")
        whys = [kernel.cannot_serve(replace(call, dtype=dtype)) for dtype in _DTYPES]
        if not all(whys):
            return ""
        why = whys[0]
    return why


def _fused(devices: Sequence[Device]) -> Finding:
    about = "Triton: packing, merging and adding in one pass each, plain torch without it"
    if fused.missing() or any(device.kind == "cuda" for device in devices):
        return Finding("fused", about, fused.missing())
    return Finding("fused", about, "torch finds no CUDA device")


def _finding_json(finding: Finding) -> dict[str, object]:
    return {"name": finding.name, "about": finding.about, "available": not finding.why_not, "why_not": finding.why_not}


def _device_row(device: Device) -> tuple[str, ...]:
    capability = ".".join(map(str, device.capability)) if device.capability else ""
    return device.name, device.kind, capability, readable_bytes(device.memory_bytes)
