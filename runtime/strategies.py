"""The registry of strategies: adding one is a new file and one line here."""

from __future__ import annotations

from autoseq.runtime.bidirectional_ring import BidirectionalRing
from autoseq.runtime.gather_kv import GatherKV
from autoseq.runtime.local import Local
from autoseq.runtime.ring import Ring
from autoseq.runtime.strategy import Strategy
from autoseq.runtime.ulysses import Ulysses

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in (Local(), Ulysses(), Ring(), BidirectionalRing(), GatherKV())}
