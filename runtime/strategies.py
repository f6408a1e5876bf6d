"""The registry of strategies: adding one is a new file and one line here."""

from __future__ import annotations

from autoseq.runtime.balanced import Balanced
from autoseq.runtime.bidirectional_ring import BidirectionalRing
from autoseq.runtime.double_ring import DoubleRing
from autoseq.runtime.gather_kv import GatherKV
from autoseq.runtime.halo import Halo
from autoseq.runtime.hybrid import Hybrid, HybridGather, HybridGatherOuter, HybridOuter
from autoseq.runtime.local import Local
from autoseq.runtime.ring import Ring
from autoseq.runtime.strategy import Strategy
from autoseq.runtime.ulysses import Ulysses

_ALL: tuple[Strategy, ...] = (
    Local(), Ulysses(), Ring(), BidirectionalRing(), GatherKV(), Halo(), Balanced(),
    Hybrid(), HybridGather(), HybridOuter(), HybridGatherOuter(), DoubleRing(),
)  # fmt: skip

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}
