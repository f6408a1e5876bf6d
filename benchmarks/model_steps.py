"""The benchmark's other step: forward and backward of a whole Llama, compiled with each strategy, beside the eager model on one device.

Peers are absent here: neither runs an unmodified model. Bytes and messages are those of the whole step, gradients' reductions included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from autoseq.runtime.strategies import STRATEGIES
from measuring import Record, count, seconds
from rank_processes import Seat
from work import DTYPES, Work

_VOCABULARY = 512
# The loss of one device and of the ranks differ by the order of their sums only.
_LOSS_TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 2e-2, "float16": 5e-3}


def measure_model(seat: Seat, work: Work, layers: int, rounds: int) -> list[dict[str, object]]:
    """Records as `measuring.measure` makes them."""
    records: list[Record] = []
    timed: list[tuple[Record, Callable[[], object]]] = []
    step, expected = _eager(work, layers), None
    expected = step()
    timed.append((Record("one device, eager", "one device"), step if seat.rank == 0 else lambda: None))
    for name, strategy in STRATEGIES.items():
        if name == "local":
            continue
        if reason := strategy.cannot_serve(work.site(seat.mesh), seat.world_size):
            records.append(Record(name, "absent", why_not=reason))
            continue
        record, step = Record(name, "autoseq", layout="auto"), _compiled(work, layers, name, seat)
        record.error = abs(step() - expected) / abs(expected)
        if not record.error <= _LOSS_TOLERANCE[work.dtype]:
            raise ArithmeticError(f"the loss with {name} is off one device's by {record.error:.1e}; its time means nothing")
        timed.append((record, step))
    for record, step in timed:
        count(record, step, seat)
    for _ in range(rounds):
        for record, step in timed:
            record.seconds.append(seconds(step))
    return [asdict(record) for record in records + [record for record, _ in timed]]


def _model(work: Work, layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden = work.heads * work.head_dim
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads, head_dim=work.head_dim, max_position_embeddings=work.seq_len, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DTYPES[work.dtype])


def _step(model: torch.nn.Module, call: Callable[..., Any], work: Work) -> Callable[[], float]:
    ids = torch.randint(0, _VOCABULARY, (work.batch, work.seq_len), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        return loss.item()

    return step


def _eager(work: Work, layers: int) -> Callable[[], float]:
    model = _model(work, layers)
    return _step(model, model, work)


def _compiled(work: Work, layers: int, strategy: str, seat: Seat) -> Callable[[], float]:
    torch._dynamo.reset()
    model = _model(work, layers)
    # aot_eager: Inductor's C++ compiler takes minutes on few cores, and what is compared here is what crosses the ranks.
    options: dict[str, Any] = {"strategy": strategy, "inner": "aot_eager"}
    if seat.mesh:
        options["ranks_per_node"] = seat.ranks_per_node
    return _step(model, torch.compile(model, backend="autoseq", options=options), work)
