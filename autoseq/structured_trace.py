"""What tlparse shows of a program: graph before, plan and graph after, as artifacts of torch's structured trace (`TORCH_TRACE`)."""

import json
from collections.abc import Callable

import torch

from autoseq.graph_text import graph_lines
from autoseq.planner import Plan
from autoseq.program import Program


def trace_program(program: Program) -> None:
    """Three artifacts. Their text is made only if somebody traces."""
    _artifact("autoseq_graph_before", "string", lambda: "\n".join(graph_lines(program.before)))
    _artifact("autoseq_plan", "json", lambda: plan_text(program.plan))
    _artifact("autoseq_graph_after", "string", lambda: "\n".join(graph_lines(program.gm.graph)))


def plan_text(plan: Plan) -> str:
    """A plan with the seconds and reasons of all that was not taken, as JSON."""
    return json.dumps({
        "layout": plan.layout, "topology": plan.topology, "attention_seconds": plan.seconds(), "attention_bytes_held": plan.memory_bytes(),
        "refused_layouts": dict(plan.refused),
        "sites": [
            {
                "name": p.site.name, "source": p.site.source, "mask": p.site.mask, "strategy": p.strategy, "seconds": p.seconds,
                "bytes_of_busiest_rank": p.offer.sent_bytes,
                "offers": {offer.strategy: offer.seconds for offer in p.offers}, "losers": dict(p.losers),
            }
            for p in plan.sites
        ],
    }, indent=2)  # fmt: skip


def _artifact(name: str, encoding: str, text: Callable[[], str]) -> None:
    torch._logging.trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=text)
