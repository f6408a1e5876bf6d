"""`autoseq doctor`: everything that is not there says why and what to do about it, and finding that out never fails."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from autoseq import cxx, doctor
from autoseq.cli import app
from autoseq.doctor import Checkup, Device, Finding, checkup, matters, verdict
from autoseq.planning.links import Card, NVLinks
from autoseq.runtime import flash_attn_kernel, fused
from autoseq.runtime.kernels import KERNELS


def of(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.why_not for finding in findings}


def test_tables() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.stderr == ""
    parts = ("Versions", torch.__version__, "Devices", "cpu", "Communication", "gloo", "nccl", "Links", "nvlink", "ethernet")
    for text in (*parts, "flash_attn", "reference", "Compilers"):
        assert text in result.stdout
    if not torch.cuda.is_available():
        assert "not needed here" in result.stdout
        assert "Verdict: ready for CPU ranks with gloo; nothing that is needed is missing." in result.stdout.splitlines()[-1]
    assert result.stdout.index("flash_attn") < result.stdout.index("reference"), "in the order they are tried"


def test_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert {device["kind"] for device in found["devices"]} >= {"cpu"}
    assert [each["name"] for each in found["kernels"]] == [*(kernel.name for kernel in KERNELS), "fused"]
    assert [each["name"] for each in found["links"]] == ["nvlink", "peer access", "infiniband", "ethernet"]
    for each in found["kernels"] + found["communication"] + found["links"]:
        assert set(each) == {"name", "about", "available", "why_not"}
        assert each["available"] == (each["why_not"] == "")


def test_a_cpu_build_says_what_it_lacks() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = checkup()
    kernels = of(found.kernels)
    assert kernels["cpu"] == kernels["reference"] == ""
    for name in ("flash", "cudnn", "efficient"):
        assert "CUDA" in kernels[name]
    assert all(found.versions[name] for name in ("autoseq", "python", "torch"))


def test_a_missing_compiler_is_in_the_verdict_with_its_cure() -> None:
    lacking = replace(checkup(), devices=[Device("CPU", "cpu", None, 1)], compilers=[Finding(cxx.NAME, "", cxx.why_not())])
    lines = verdict(lacking)
    assert re.search(r"not all .* C\+\+ compiler: \S+ cannot be run; install one .*CXX.*aot_eager", " ".join(lines))
    assert max(map(len, lines)) <= 80


def test_one_gpu_is_not_alarmed_about_links_between_several() -> None:
    devices = [Device("GPU", "cuda", (9, 0), 1)]
    assert not matters(Finding("nvlink", "", "one device"), devices)
    assert not matters(Finding("peer access", "", "one device"), devices)
    assert matters(Finding("nvlink", "", "no link"), devices * 2)
    assert matters(Finding("nccl", "", "no NCCL"), devices)


def on_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> Checkup:
    """What is found on a machine with such a GPU and everything installed."""
    properties = SimpleNamespace(name="Some GPU", major=major, minor=minor, total_memory=24 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(doctor, "KERNELS", tuple(replace(kernel, missing=lambda: "") for kernel in KERNELS))
    monkeypatch.setattr(fused, "missing", lambda: "")
    monkeypatch.setattr(doctor, "nvlinks", lambda: NVLinks(0))
    return checkup()


def test_a_new_gpu_has_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_gpu(monkeypatch, 9, 0)
    assert [device.name for device in found.devices][1:] == ["Some GPU"]
    assert not any(of(found.kernels).values())


def test_an_old_gpu_says_what_it_is_too_old_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = of(on_gpu(monkeypatch, 7, 5).kernels)
    assert "compute capability 8.0" in kernels["flash"]
    assert "compute capability 8.0" in kernels["flash_attn"]
    assert kernels["efficient"] == "", "it serves float16 there"


CARDS = (Card("mlx5_0", "infiniband", 50e9), Card("mlx5_1", "infiniband", 50e9), Card("eth0", "ethernet", 1.25e9))


@pytest.mark.parametrize(
    ("devices", "nvlink", "peers", "cards", "expected"),
    [
        pytest.param(8, NVLinks(18), True, CARDS, ("", "", "", ""), id="everything"),
        pytest.param(2, NVLinks(0), False, (), ("no active NVLink", "the host's memory", "rdma-core", "no network card"), id="nothing"),
        pytest.param(2, NVLinks(0, "no NVML"), True, CARDS[:1], ("no NVML", "", "", "no network"), id="no NVML"),
        pytest.param(1, NVLinks(18), True, CARDS[2:], ("one CUDA device", "one CUDA device", "sockets", ""), id="one device"),
        pytest.param(0, NVLinks(0), True, (), ("no CUDA device", "no CUDA device", "sockets", "up"), id="no device"),
    ],
)
def test_links_that_are_not_there_say_why(
    devices: int, nvlink: NVLinks, peers: bool, cards: tuple[Card, ...], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "nvlinks", lambda: nvlink)
    monkeypatch.setattr(doctor, "network_cards", lambda: cards)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: peers)
    found = doctor._links([Device("GPU", "cuda", (9, 0), 1)] * devices)
    for finding, why in zip(found, expected, strict=True):
        assert why in finding.why_not
        assert bool(why) == bool(finding.why_not)
    abouts = " ".join(finding.about for finding in found)
    for card in cards:
        assert f"{card.name} {8 * card.bytes_per_s / 1e9:g} Gb/s" in abouts


BROKEN = "libcudart.so.99: cannot open shared object file"


@pytest.mark.parametrize(
    ("version", "import_fails", "reason"),
    [
        pytest.param(None, False, r"not installed; pip install flash-attn", id="not installed"),
        pytest.param("2.8.3", True, rf"2\.8\.3 does not import \({BROKEN}\); build it for this torch", id="built for something else"),
        pytest.param("2.5.0", False, r"2\.5\.0 registers no operators; 2\.7 and later do", id="too old"),
    ],
)
def test_flash_attn_that_cannot_be_used(version: str | None, import_fails: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(package: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    def imported(_: str) -> None:
        if import_fails:
            raise ImportError(BROKEN)

    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.setattr(importlib, "import_module", imported)
    monkeypatch.setattr(torch.ops, "flash_attn", SimpleNamespace(), raising=False)
    flash_attn_kernel._operators.cache_clear()
    try:
        assert re.search(reason, flash_attn_kernel.FLASH_ATTN.missing())
    finally:
        flash_attn_kernel._operators.cache_clear()
