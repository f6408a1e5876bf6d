"""A topology as JSON text, for people to read and edit: units are in the names of fields, and a mistake is an error that names the field.

    {"name": "two-nodes", "ranks_per_node": 4, "nodes": 2,
     "inside": {"duplex": "full", "send": {"latency_us": 10, "gbytes_per_s": 20}, "all_to_all": ...},
     "between": null, or as "inside", with "lanes",
     "kernels": {"bfloat16": {"peak_tflops": 125, "matmul_tflops": 70, "attention_tflops": 60, "attention_backward_tflops": 50}},
     "memory_gib": 24, "memory_gbytes_per_s": 600, "launch_us": 5, "attention_tile": 128,
     "host": null, or {"latency_us": 300, "gbytes_per_s": 1, "ranks_per_core": 1, "sharing_ranks": 1},
     "sources": ["memory_gib: the vendor's data sheet"]}

Numbers are read as decimals, so that what is written comes back as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from decimal import Decimal
from typing import Any

from autoseq.planning.topology import DTYPES, KINDS, Host, KernelRates, Link, Rate, Topology
from autoseq.runtime.errors import TopologyError, did_you_mean

_Units = Mapping[str, Decimal]
"""How a field may be called, and what its number is multiplied with; the first is how we write it."""


def _units(**factors: str) -> dict[str, Decimal]:
    return {name: Decimal(factor) for name, factor in factors.items()}


_LATENCY = _units(latency_us="1e-6", latency_ms="1e-3", latency_s="1")
_SPEED = _units(gbytes_per_s="1e9", mbytes_per_s="1e6", bytes_per_s="1")
_RANKS_PER_CORE = _units(ranks_per_core="1")
_MEMORY_SPEED = _units(memory_gbytes_per_s="1e9", memory_bytes_per_s="1")
_LAUNCH = _units(launch_us="1e-6", launch_s="1")
_MEMORY = _units(memory_gib="1073741824", memory_bytes="1")
_FLOPS = {f.name: {f.name.replace("flops_per_s", "tflops"): Decimal("1e12"), f.name: Decimal(1)} for f in fields(KernelRates)}

_INNERMOST = re.compile(r"\{\n([^{}]*)\n *\}")
"""An object without objects in it, which is written in one line. JSON has no line breaks inside a text."""


def parse_topology(text: str, where: str) -> Topology:
    """Read a topology; `where` is what messages call the text. Raises TopologyError for anything that is not as it must be."""
    try:
        data = json.loads(text, parse_float=Decimal, parse_int=Decimal, parse_constant=Decimal, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError, ArithmeticError) as error:
        raise TopologyError(f"{where} is not JSON: {error}") from error
    except TopologyError as error:
        raise TopologyError(f"{where}: {error}") from error
    top = _Section(where, "", data)
    name, sources = top.text("name"), top.texts("sources")
    ranks_per_node, nodes = top.count("ranks_per_node"), top.count("nodes")
    inside = _link(top.section("inside"), lanes=False)
    between = None if top.is_null("between") else _link(top.section("between"), lanes=True)
    kernels = _kernels(top.section("kernels"))
    memory_bytes = int(top.number(_MEMORY).to_integral_value())
    speed, launch, tile = float(top.number(_MEMORY_SPEED)), float(top.number(_LAUNCH)), top.count("attention_tile")
    host = None if top.is_null("host") else _host(top.section("host"))
    top.end()
    if nodes > 1 and between is None:
        raise TopologyError(f"{where}: between is null, but there are {nodes} nodes; describe the link between them, or make it one node")
    return Topology(name, ranks_per_node, nodes, inside, between, kernels, memory_bytes, speed, launch, sources, tile, host)


def dump(topology: Topology) -> str:
    """The topology as JSON; `parse_topology` makes an equal one of it."""
    text = json.dumps({
        "name": topology.name, "ranks_per_node": topology.ranks_per_node, "nodes": topology.nodes,
        "inside": _link_fields(topology.inside, lanes=False),
        "between": topology.between and _link_fields(topology.between, lanes=True),
        "kernels": {dtype: _rates_fields(rates) for dtype, rates in topology.kernels.items()},
        **_written(topology.memory_bytes, _MEMORY), **_written(topology.memory_bytes_per_s, _MEMORY_SPEED),
        **_written(topology.launch_s, _LAUNCH), "attention_tile": topology.attention_tile,
        "host": topology.host and _host_fields(topology.host), "sources": list(topology.sources),
    }, indent=2, ensure_ascii=False)  # fmt: skip
    return _INNERMOST.sub(lambda found: "{" + ", ".join(line.strip(" ,") for line in found[1].splitlines()) + "}", text)


def _link(section: _Section, *, lanes: bool) -> Link:
    rates = {}
    for kind in KINDS:
        rates[kind] = _rate(section.section(kind))
    duplex = section.text("duplex")
    if duplex not in ("full", "half"):
        raise section.error("duplex", f'is "full" or "half", not {duplex!r}')
    count = section.count("lanes") if lanes else 1
    section.end()
    return Link(**rates, duplex=duplex, lanes=count)  # type: ignore[arg-type]


def _rate(section: _Section) -> Rate:
    rate = Rate(float(section.number(_LATENCY)), float(section.number(_SPEED)))
    section.end()
    return rate


def _host(section: _Section) -> Host:
    latency, speed, share = (float(section.number(units)) for units in (_LATENCY, _SPEED, _RANKS_PER_CORE))
    host = Host(latency, speed, share, section.count("sharing_ranks"))
    if host.ranks_per_core < 1:
        raise section.error("ranks_per_core", f"is 1 or more, not {host.ranks_per_core}; 1 means that each rank has a core")
    section.end()
    return host


def _kernels(section: _Section) -> dict[str, KernelRates]:
    found = {}
    for dtype in section.names(DTYPES):
        each = section.section(dtype)
        found[dtype] = KernelRates(**{name: float(each.number(units)) for name, units in _FLOPS.items()})
        each.end()
    section.end()
    if not found:
        raise section.error("", f"has no dtype; give the rates of at least one of {', '.join(DTYPES)}")
    return found


class _Section:
    """A JSON object that is being read: what is taken from it by name, and at the end that nothing is left."""

    def __init__(self, where: str, path: str, data: Any) -> None:
        self._where, self._path, self._known = where, path, list[str]()
        if not isinstance(data, dict):
            raise self.error("", f"is an object, not {_kind(data)}")
        self._data: dict[str, Any] = data

    def error(self, name: str, what: str) -> TopologyError:
        path = ".".join(part for part in (self._path, name) if part)
        return TopologyError(f"{self._where}: {path or 'a topology'} {what}")

    def section(self, name: str) -> _Section:
        path = f"{self._path}.{name}" if self._path else name
        return _Section(self._where, path, self._take(name))

    def names(self, known: Sequence[str]) -> list[str]:
        """Which of these there are; another name is unknown."""
        self._known += known
        return [name for name in known if name in self._data]

    def is_null(self, name: str) -> bool:
        return self._take(name) is None

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str) or not value:
            raise self.error(name, f"is a text, not {_kind(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._take(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.error(name, "is a list of texts")
        return tuple(value)

    def count(self, name: str) -> int:
        value = self._take(name)
        if not isinstance(value, Decimal) or not value.is_finite() or value < 1 or (_is_sane(value) and value != value.to_integral_value()):
            raise self.error(name, f"is a whole number, 1 or more, not {_kind(value)}")
        if not _is_sane(value):
            raise self.error(name, f"is out of range: {value}")
        return int(value)

    def number(self, units: _Units) -> Decimal:
        """The one of these fields that there is, in the unit that the last of them names."""
        names = [name for name in units if name in self._data] or [next(iter(units))]
        if len(names) > 1:
            raise self.error(names[1], f"says again what {names[0]} says; leave one of them out")
        self._known += units
        value = self._take(names[0], others=list(units)[1:])
        if not isinstance(value, Decimal) or not value.is_finite() or value <= 0:
            raise self.error(names[0], f"is a number above 0, not {_kind(value)}")
        if not _is_sane(value):
            raise self.error(names[0], f"is out of range: {value}")
        return value * units[names[0]]

    def end(self) -> None:
        """Raises TopologyError for a field that nobody took."""
        for name in self._data:
            if name not in self._known:
                known = dict.fromkeys(self._known)
                raise self.error(name, f"is unknown{did_you_mean(name, known)}; fields here are {', '.join(known)}")

    def _take(self, name: str, others: Sequence[str] = ()) -> Any:
        self._known.append(name)
        if name not in self._data:
            misspelt = [given for given in self._data if repr(name) in did_you_mean(given, [name])]
            hint = f"; there is {misspelt[0]!r}" if misspelt else ""
            raise self.error(name, "is missing" + "".join(f", or {other}" for other in others) + hint)
        return self._data[name]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise TopologyError(f"the field {next(n for n in names if names.count(n) > 1)!r} is there twice in one object")
    return data


def _is_sane(value: Decimal) -> bool:
    """Whether a number is of a size that something can have, in any unit: arithmetic with others overflows, or does not end."""
    return abs(value.adjusted()) < 100


def _kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return f"the text {value!r}" if isinstance(value, str) else str(value) if isinstance(value, Decimal) else json.dumps(value)


def _link_fields(link: Link, *, lanes: bool) -> dict[str, Any]:
    rates = {kind: _rate_fields(link.rate(kind)) for kind in KINDS}
    return {"duplex": link.duplex, **({"lanes": link.lanes} if lanes else {}), **rates}


def _rate_fields(rate: Rate) -> dict[str, Any]:
    return {**_written(rate.latency_s, _LATENCY), **_written(rate.bytes_per_s, _SPEED)}


def _host_fields(host: Host) -> dict[str, Any]:
    return _rate_fields(host) | _written(host.ranks_per_core, _RANKS_PER_CORE) | {"sharing_ranks": host.sharing_ranks}


def _rates_fields(rates: KernelRates) -> dict[str, Any]:
    return {name: value for field, units in _FLOPS.items() for name, value in _written(getattr(rates, field), units).items()}


def _written(value: float, units: _Units) -> dict[str, float | int]:
    """The number in the unit that is easiest to read among those that lose nothing. Whole numbers may be rounded in theirs."""
    exact = Decimal(repr(value))
    for name, factor in units.items():
        scaled = round(exact / factor, 3) if isinstance(value, int) else exact / factor
        written = int(scaled) if scaled == scaled.to_integral_value() else float(scaled)
        again = Decimal(repr(written)) * factor
        if (again.to_integral_value() if isinstance(value, int) else again) == exact:
            return {name: written}
    return {name: value}
