"""Hardware whose every rate is one, and an attention for it: what a prediction comes to can be counted by hand."""

from dataclasses import replace

from autoseq.planning.topology import KernelRates, Link, Rate, Topology
from autoseq.runtime.strategy import Site
from autoseq.runtime.timeline import MessageKind, Scope

SITE = Site(batch=1, q_len=64, k_len=64, heads=4, kv_heads=4, head_dim=1, value_dim=1, element_bytes=4)


def link(latency_s: float = 0.0, bytes_per_s: float = 1.0) -> Link:
    return Link(*[Rate(latency_s, bytes_per_s)] * 5)


def seconds_in(scope: Scope, hardware: Topology, kind: MessageKind, num_bytes: float, messages: float, *, ranks: int) -> float:
    """What the messages of one rank take among those of a scope, while all others send alike: the slowest way that they take decides."""
    return max((path.seconds(num_bytes, messages) for path in hardware.paths(kind, ranks=ranks, scope=scope)), default=0.0)


def topology(**changes: object) -> Topology:
    """One flop, one byte over a link and one byte of memory a second."""
    plain = Topology("unit", 4, 1, link(), link(), {"float32": KernelRates(1, 1, 1, 1)}, 1 << 40, 1.0, 0.0, attention_tile=1)
    return replace(plain, **changes)  # type: ignore[arg-type]
