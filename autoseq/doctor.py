"""What `autoseq doctor` finds: versions, devices, ways to communicate, links and attention kernels, or why they are not there.

Nothing is run on a device and no package is imported but torch and, if they are there, NVML's and flash-attn, whose import may fail.
"""

import json
import os
import platform
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata

import torch
import torch.cuda.nccl
import torch.distributed
from rich.console import Console

from autoseq import cxx
from autoseq.planning.links import Card, network_cards, nvlinks
from autoseq.readable import readable_bytes
from autoseq.runtime import fused
from autoseq.runtime.kernel_call import BlockCall, Kernel
from autoseq.runtime.kernels import KERNELS
from autoseq.tables import table

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
    compilers: list[Finding] = field(default_factory=list)


def checkup() -> Checkup:
    """Look at this installation."""
    devices = _devices()
    kernels = [*_kernels(devices), _fused(devices)]
    return Checkup(_versions(), devices, _communication(), _links(devices), kernels, [_cxx()])


def checkup_json(found: Checkup) -> str:
    """One object, as documented: scripts may rely on these names."""
    return json.dumps({
        "versions": found.versions,
        "devices": [asdict(device) for device in found.devices],
        "communication": [_finding_json(finding) for finding in found.communication],
        "links": [_finding_json(finding) for finding in found.links],
        "kernels": [_finding_json(finding) for finding in found.kernels],
        "compilers": [_finding_json(finding) for finding in found.compilers],
        "verdict": verdict(found),
    })  # fmt: skip


def print_checkup(console: Console, found: Checkup) -> None:
    """Tables of everything; what is not there says why."""
    console.print(table("Versions", ("what", "version"), [(name, version or "not there") for name, version in found.versions.items()]))
    console.print(table("Devices", ("device", "kind", "capability", ":memory"), [_device_row(device) for device in found.devices]))
    parts = {
        "Compilers": found.compilers,
        "Communication": found.communication,
        "Links, which `autoseq topology measure` times": found.links,
        "Attention kernels, in the order they are tried": found.kernels,
    }
    for title, findings in parts.items():
        rows = [_finding_row(each, is_needed=matters(each, found.devices)) for each in findings]
        console.print(table(title, ("name", "what it is", "there", "why not"), rows))
    console.print("\n" + "\n".join(verdict(found)))


def _finding_row(each: Finding, *, is_needed: bool) -> tuple[str, str, str, str]:
    """What is not there and makes no difference on this machine is no cause for alarm."""
    if not each.why_not:
        return each.name, each.about, "yes", ""
    there, reason = ("no", each.why_not) if is_needed else ("–", "not needed here")
    return each.name, each.about, there, reason


_WITHOUT_CUDA = ("gloo", "cpu", "reference", cxx.NAME)
_FOR_SEVERAL_DEVICES = ("nvlink", "peer access")


def matters(finding: Finding, devices: Sequence[Device]) -> bool:
    """Whether something that is not there would be of use on these devices; links between machines say so only where there is CUDA."""
    count = sum(device.kind == "cuda" for device in devices)
    if count == 0:
        return finding.name in _WITHOUT_CUDA
    return not (finding.name in _FOR_SEVERAL_DEVICES and count == 1) and finding.name != "ethernet"


_FAST = ("flash_attn", "flash", "cudnn")


def verdict(found: Checkup) -> list[str]:
    """What this machine can run, and what to do about what it lacks, in lines of 80 columns."""
    devices = [device for device in found.devices if device.kind == "cuda"]
    lacking = [each for each in [*found.communication, *found.compilers] if each.why_not and matters(each, found.devices)]
    if devices and all(each.why_not for each in found.kernels if each.name in _FAST):
        lacking.append(Finding("fast attention on CUDA", "", f"none of {', '.join(_FAST)} serves this device; see above"))
    where = f"{len(devices)} × {devices[0].name} with NCCL" if devices else "CPU ranks with gloo"
    if not devices and shutil.which("nvidia-smi"):
        lacking.append(Finding("CUDA", "", "an NVIDIA driver is here, but torch finds no device; install a CUDA build from pytorch.org"))
    if not lacking:
        return [f"Verdict: ready for {where}; nothing that is needed is missing."]
    lines = textwrap.wrap(f"Verdict: not all that {where} needs is there:", 80)
    return lines + [line for each in lacking for line in textwrap.wrap(f"- {each.name}: {each.why_not}", 80, subsequent_indent="  ")]


def _cxx() -> Finding:
    about, found = "for Inductor, the default inner compiler, on CPUs", cxx.find_cxx()
    return Finding(cxx.NAME, f"{about}: {found}", "") if found else Finding(cxx.NAME, about, cxx.why_not())


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
