"""An emulated slow network on one machine, so that communication dominates and timing a strategy means something.

    sudo python benchmarks/slow_network.py up --nodes 2 --rate 200mbit
    sudo ip netns exec autoseq-cli-node0 ...
    sudo python benchmarks/slow_network.py down

Each node is a network namespace with one rate-limited link to a bridge, which lives in a namespace of its own:

    node0 [eth0 10.77.0.1] --rate--+
    node1 [eth0 10.77.0.2] --rate--+-- hub [br0]
    ...

Both ends of a link are limited (`tc ... tbf`), so a node neither sends nor receives faster than `rate`, and may do both at once.
Ranks in one namespace reach each other over its loopback device, which nothing limits: the kernel routes a node's own address there.

Nothing appears outside these namespaces, so two networks never meet and removing the namespaces removes everything. A network that is
used as a context manager is named after its process; what a killed process left behind is removed when the next network is built.
Needs Linux, root and iproute2.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer

DEVICE = "eth0"
_PREFIX = "autoseq"
_OWNED = re.compile(rf"{_PREFIX}-p(\d+)\.\d+-")
_MAX_NODES = 200
_serials = itertools.count()

# Segments of at most this size leave a node, so that the bucket may be small: a bucket is a head start that every pause renews. It holds
# what a link carries in this time, or a segment and a half: where cores are busy, the kernel fills it late, and what overflows is lost.
_SEGMENT_BYTES = 16384
_BURST_S = 2e-3
# Longer than what TCP ever has in flight: nothing is dropped, so nothing is sent twice.
_QUEUE = "16mb"


RATES = "a rate is written as in 200mbit or 1.5gbit, not {!r}"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def bits_per_s(rate: str) -> float | None:
    """The number that a rate stands for, or None."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate)
    return float(parts[1]) * _UNITS[parts[2]] if parts else None


class NetworkError(Exception):
    """The network cannot be built here."""


def why_not() -> str | None:
    """What keeps this machine from emulating a network, or None; found out by building the smallest one."""
    if reason := _lacking():
        return reason
    try:
        with SlowNetwork(1, "1mbit"):
            return None
    except NetworkError as error:
        return str(error)


def _lacking() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"network namespaces are Linux's, and this is {sys.platform}"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"iproute2 is not installed ({' and '.join(missing)} not found); Debian and Ubuntu have it in the package iproute2"
    if os.geteuid() != 0:
        return "only root may make network namespaces: run this with sudo"
    return None


def _own_name() -> str:
    return f"p{os.getpid()}.{next(_serials)}"


@dataclass(frozen=True, slots=True)
class SlowNetwork:
    """`nodes` namespaces whose links carry `rate` (as tc writes it: 200mbit, 1gbit) each way."""

    nodes: int
    rate: str
    name: str = field(default_factory=_own_name)

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= _MAX_NODES:
            raise NetworkError(f"a network has 1 to {_MAX_NODES} nodes, not {self.nodes}")
        if not bits_per_s(self.rate):
            raise NetworkError(RATES.format(self.rate))
        if not re.fullmatch(r"[a-z0-9.]+", self.name):
            raise NetworkError(f"a network's name is made of small letters, digits and dots, not {self.name!r}")

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    def up(self) -> None:
        """Build it, in the place of one of the same name. Raises NetworkError, and then leaves nothing behind."""
        if reason := _lacking():
            raise NetworkError(f"no slow network can be emulated here: {reason}")
        remove_abandoned()
        self.down()
        try:
            self._build()
        except NetworkError:
            self.down()
            raise

    def down(self) -> None:
        """Remove it, or what there is of it."""
        for namespace in _namespaces():
            if namespace.startswith(f"{_PREFIX}-{self.name}-"):
                _remove(namespace)

    def namespace(self, node: int) -> str:
        return f"{_PREFIX}-{self.name}-node{node}"

    def inside(self, node: int) -> list[str]:
        """What to put before a command so that it runs on a node."""
        return ["ip", "netns", "exec", self.namespace(node)]

    @staticmethod
    def address(node: int) -> str:
        return f"10.77.0.{node + 1}"

    @property
    def hub(self) -> str:
        return f"{_PREFIX}-{self.name}-hub"

    def _build(self) -> None:
        _ip("netns", "add", self.hub)
        _ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.hub, "link", "set", "br0", "up")
        for node in range(self.nodes):
            self._add_node(node, self.namespace(node), f"node{node}")

    def _add_node(self, node: int, namespace: str, port: str) -> None:
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", self.hub, "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", namespace)
        _ip("-n", self.hub, "link", "set", port, "master", "br0", "up")
        _ip("-n", namespace, "addr", "add", f"{self.address(node)}/24", "dev", DEVICE)
        _ip("-n", namespace, "link", "set", DEVICE, "up", "gso_max_size", str(_SEGMENT_BYTES))
        burst = max(3 * _SEGMENT_BYTES // 2, int((bits_per_s(self.rate) or 0) / 8 * _BURST_S))
        for where, device in ((namespace, DEVICE), (self.hub, port)):
            _run("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", "rate", self.rate, "burst", str(burst), "limit", _QUEUE)


def remove_abandoned() -> list[str]:
    """Remove the namespaces of networks whose process is gone; returns their names."""
    gone = [name for name in _namespaces() if (owned := _OWNED.match(name)) and not Path(f"/proc/{owned[1]}").exists()]
    for namespace in gone:
        _remove(namespace)
    return gone


def _remove(namespace: str) -> None:
    try:
        _ip("netns", "delete", namespace)
    except NetworkError:
        if namespace in _namespaces():  # else another process was faster
            raise


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


app = typer.Typer(help=(__doc__ or "").partition("\n")[0], add_completion=False, rich_markup_mode=None)
_Name = Annotated[str, typer.Option(help="Networks of different names stand side by side.")]


@app.command()
def up(nodes: int = 2, rate: str = "200mbit", name: _Name = "cli") -> None:
    """Build a network that stays until `down`."""
    network = _network(nodes, rate, name)
    _or_exit(network.up)
    for node in range(nodes):
        typer.echo(f"{' '.join(network.inside(node))} ...   # {network.address(node)}, {rate} each way")


@app.command()
def down(name: _Name = "cli") -> None:
    """Remove a network, and whatever killed processes left behind."""
    _or_exit(_network(1, "1mbit", name).down)
    _or_exit(remove_abandoned)


def _network(nodes: int, rate: str, name: str) -> SlowNetwork:
    try:
        return SlowNetwork(nodes, rate, name)
    except NetworkError as error:
        typer.echo(str(error), err=True)
        raise SystemExit(2) from None


def _or_exit(action: Callable[[], object]) -> None:
    try:
        if reason := _lacking():
            raise NetworkError(f"no slow network can be emulated here: {reason}")
        action()
    except NetworkError as error:
        typer.echo(str(error), err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    app()
