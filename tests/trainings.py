"""Models to plan for, as numbers: layers of the size of Llama 3 8B's."""

from __future__ import annotations

from autoseq.planner import NamedSite
from autoseq.planning.model_cost import Collective, ModelCost, PassCost
from autoseq.planning.presets import load_topology
from autoseq.planning.sweep import Looked
from autoseq.planning.training import Training
from autoseq.runtime.strategy import Site

H100 = load_topology("8xH100")


def training(*, batch: int = 8, seq_len: int = 8192, layers: int = 2, sharded: bool = False, window: int | None = None) -> Training:
    """Some layers of the size of Llama 3 8B's."""
    site = Site(
        batch=batch, q_len=seq_len, k_len=seq_len, heads=32, kv_heads=8, head_dim=128, value_dim=128, element_bytes=2,
        max_ahead=0, max_behind=window,
    )  # fmt: skip
    weights = 218_000_000 * layers
    cost = ModelCost(
        tokens=1024, ranks=1,
        forward=PassCost((("bfloat16", 2 * 1024 * weights),), 0, 1024 * 400_000 * layers, 20 * layers),
        backward=PassCost((("bfloat16", 4 * 1024 * weights),), 2 * weights, 1024 * 700_000 * layers, 40 * layers),
        reduced=(Collective("all_reduce", 2 * weights, layers),),
        exchanged=(),
        parameters=weights, trained=weights, parameter_bytes=2 * weights, gradient_bytes=2 * weights,
        kept_bytes=1024 * 200_000 * layers, largest_bytes=1024 * 28_672,
    )  # fmt: skip
    return Training(tuple(NamedSite(f"layers.{i}", "model.py:1", "k <= q", site) for i in range(layers)), cost, batch, seq_len, sharded)


def looked(training: Training) -> Looked:
    """The model at other lengths, whatever the ranks."""
    return lambda length, ranks: training.at(seq_len=length)
