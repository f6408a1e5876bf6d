"""A whole training step on many ranks: attention as it was planned, the rest of the model, and the reduction of gradients.

    step  =  forward  +  backward  +  gradient reduction
    one way  =  products at their rate  +  the rest's memory traffic  +  launches  +  attention  +  exchanges of steps that need other rows

Nothing of these overlaps but what a strategy overlaps inside an attention; with sharded parameters, they are gathered under the
computation, as FSDP does. Sharded parameters come back once in the forward and once in the backward. Gradients are summed over the
ranks of a sequence, in the program, and then by DDP over the copies of the data, or, if parameters are sharded, by FSDP over all ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from autoseq.planner import NamedSite, Plan
from autoseq.planning.gathered import cost_on
from autoseq.planning.model_cost import Collective, ModelCost, PassCost
from autoseq.planning.topology import Topology
from autoseq.program import Warned
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.timeline import WAYS, Way, flops

OPTIMIZER_BYTES = 8
"""Of each parameter that is trained: the two float32 moments of Adam."""

_BUCKET_BYTES = 25 * 2**20
"""Of gradients in one message of DDP, unless it is told another size."""


@dataclass(frozen=True, slots=True)
class Split:
    """Copies of the data, and ranks that share a sequence. `mesh` is () where these are all alike, else (nodes, ranks in a node)."""

    data: int
    sequence: int
    mesh: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        """All there are."""
        return self.data * self.sequence

    def __str__(self) -> str:
        mesh = f" ({self.mesh[0]} × {self.mesh[1]})" if self.mesh else ""
        return f"{self.data} × {self.sequence}{mesh}"


@dataclass(frozen=True)
class Training:
    """A model with the batch and length that a step is to have in all.

    `cost_on_more` is a look at it on more ranks than `cost`, for a model with steps that see all rows. `warnings` are what a run of it
    warns of, with the bytes of whole values.
    """

    sites: tuple[NamedSite, ...]
    cost: ModelCost
    batch: int
    seq_len: int
    shard_parameters: bool = False
    cost_on_more: ModelCost | None = None
    warnings: tuple[Warned, ...] = ()

    def at(self, *, batch: int | None = None, seq_len: int | None = None) -> Training:
        """The same model with another batch or length: all lengths of its attentions change in proportion."""
        batch, seq_len = batch or self.batch, seq_len or self.seq_len

        def length(n: int) -> int:
            return max(1, n * seq_len // self.seq_len)

        def site(named: NamedSite) -> NamedSite:
            old = named.site
            per_batch = old.batch // self.batch or 1
            return replace(named, site=replace(old, batch=per_batch * batch, q_len=length(old.q_len), k_len=length(old.k_len)))

        return replace(self, sites=tuple(map(site, self.sites)), batch=batch, seq_len=seq_len)

    def on(self, mesh: tuple[int, ...]) -> list[NamedSite]:
        """The attentions on a mesh of so many nodes and ranks, or on a flat one."""
        return [replace(named, site=replace(named.site, mesh=mesh)) for named in self.sites]

    def cost_on(self, P: int) -> ModelCost:
        """The cost for `cost.tokens` tokens of a rank, where a sequence is on P ranks."""
        return cost_on(P, self.cost, self.cost_on_more)

    def sharded(self) -> Training:
        """As under FSDP."""
        return replace(self, shard_parameters=True)

    def checkpointed(self) -> Training:
        """As if each layer were computed again in the backward: of what is kept besides attention, only what goes into each is left.

        What attention itself keeps stays: its results came over the network, and are not asked for again.
        """
        sites = [named.site for named in self.sites]
        whole = sum(site.batch * site.q_len * site.heads * site.head_dim * site.element_bytes for site in sites)

        def of(cost: ModelCost) -> ModelCost:
            return replace(cost, kept_bytes=min(cost.kept_bytes, whole * cost.tokens // self.tokens))

        more = self.cost_on_more
        return replace(self, cost=of(self.cost), cost_on_more=None if more is None else of(more))

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def dtype(self) -> str:
        """That of most products."""
        return max(self.cost.forward.flops, key=lambda pair: pair[1], default=("float32", 0))[0]

    @property
    def shortest(self) -> int:
        """Of the sequence and the lengths of its attentions: no more ranks can share it."""
        return min(self.seq_len, *(n for named in self.sites for n in (named.site.q_len, named.site.k_len)))

    @cached_property
    def step_flops(self) -> int:
        """Of matrix products, without what is computed again: the backward's are twice the forward's."""
        alone = self.cost_on(1)
        products = sum(number for way in (alone.forward, alone.backward) for _, number in way.flops)
        per_site = Counter(named.site for named in self.sites)
        attention = 0
        for site, count in per_site.items():
            pairs = STRATEGIES["local"].work(site, 1, "contiguous", 0, "forward").pairs
            attention += count * 3 * flops(pairs, site.head_dim, site.value_dim, "forward")
        return products * self.tokens // alone.tokens + attention


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a rank holds at the end of the forward, when it holds most."""

    parameters: int  # and buffers
    gradients: int
    optimizer: int
    activations: int  # what autograd keeps besides attention
    attention: int  # what attention keeps, and the buffers of its messages
    largest: int  # twice the largest tensor: the logits, and their gradient
    gathered: int = 0  # the largest value that a step without a rule, or with rows elsewhere, gathers

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Predicted seconds of a step, by what they go into."""

    attention_s: float
    products_s: float
    traffic_s: float  # memory traffic and launches of the rest
    exchanges_s: float
    parameters_s: float  # sums of gradients; with sharded parameters, what of their traffic nothing hides

    @property
    def seconds(self) -> float:
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def tokens_of_rank(training: Training, split: Split, layout: Layout) -> int:
    """Rows times batch of one rank, padding included."""
    return training.batch // split.data * local_length(training.seq_len, split.sequence, layout)


def memory_besides_attention(training: Training, split: Split, layout: Layout) -> Memory:
    """What a rank holds, attention not counted."""
    cost, tokens = training.cost_on(split.sequence), tokens_of_rank(training, split, layout)
    parts = split.ranks if training.shard_parameters else 1
    return Memory(
        parameters=cost.parameter_bytes // parts + cost.buffer_bytes,
        gradients=cost.gradient_bytes // parts,
        optimizer=OPTIMIZER_BYTES * cost.trained // parts,
        activations=cost.kept_bytes * tokens // cost.tokens,
        attention=0,
        largest=2 * cost.largest_bytes * tokens // cost.tokens,
        gathered=cost.gathered_bytes * tokens // cost.tokens if split.sequence > 1 else 0,
    )


def step_time(training: Training, split: Split, plan: Plan, topology: Topology) -> StepTime:
    """Predicted seconds."""
    P = split.sequence
    cost = training.cost_on(P)
    share = tokens_of_rank(training, split, plan.layout) / cost.tokens
    products, traffic = dict[Way, float](), dict[Way, float]()
    for way in WAYS:
        products[way], traffic[way] = rest_seconds(cost.way(way), topology, share)
    return StepTime(
        attention_s=plan.seconds(),
        products_s=sum(products.values()),
        traffic_s=sum(traffic.values()),
        exchanges_s=sum(_collective_seconds(each, P, topology, share) for each in cost.exchanged) if P > 1 else 0.0,
        parameters_s=_parameter_seconds(training, split, topology, {way: products[way] + traffic[way] for way in WAYS}),
    )


def rest_seconds(spent: PassCost, topology: Topology, share: float = 1.0) -> tuple[float, float]:
    """Of one way besides attention: matrix products, and the memory traffic and launches of other kernels. `share` is of the tokens."""
    products = sum(number * share / topology.kernel_rates(dtype).matmul_flops_per_s for dtype, number in spent.flops + spent.again)
    moved = spent.fixed_bytes + spent.growing_bytes * share
    return products, moved / topology.memory_bytes_per_s + spent.launches * topology.launch_s


def sent_bytes(training: Training, split: Split, plan: Plan) -> int:
    """What the busiest rank sends in a step."""
    P, W = split.sequence, split.ranks
    cost, tokens = training.cost_on(P), tokens_of_rank(training, split, plan.layout)
    exchanged = sum(each.full_bytes * tokens * (P - 1) // (P * cost.tokens) for each in cost.exchanged)
    summed = sum(2 * each.full_bytes * (ranks - 1) // ranks for each, ranks in (*_summed(cost, P), *_averaged(training, split.data)))
    sharded = 2 * cost.parameter_bytes + cost.gradient_bytes if training.shard_parameters else 0
    return plan.step_bytes() + exchanged + summed + sharded * (W - 1) // W


Sum = tuple[Collective, int]
"""All-reduces, and among how many ranks."""


def _summed(cost: ModelCost, P: int) -> list[Sum]:
    """Gradients and losses over the ranks of a sequence; a model that was looked at on one rank did not reduce any."""
    reduced = cost.reduced or (Collective("all_reduce", cost.gradient_bytes, 1),)
    return [(each, P) for each in reduced] if P > 1 else []


def _averaged(training: Training, copies: int) -> list[Sum]:
    """Gradients over the copies of the data, as DDP has them; FSDP brings them together itself."""
    size = training.cost.gradient_bytes
    return [(Collective("all_reduce", size, -(-size // _BUCKET_BYTES)), copies)] if copies > 1 and not training.shard_parameters else []


def _parameter_seconds(training: Training, split: Split, topology: Topology, busy: dict[Way, float]) -> float:
    """`busy`: what the rest of the model takes each way, under which sharded parameters travel."""
    P, W, cost = split.sequence, split.ranks, training.cost
    hardware = topology.at(W)
    summed = sum(_collective_seconds(each, ranks, topology) for each, ranks in _summed(cost, P))
    averaged = sum(_collective_seconds(each, copies, hardware.every(P)) for each, copies in _averaged(training, split.data))
    if not training.shard_parameters or W == 1:
        return summed + averaged
    messages = max(1, sum(each.messages for each in cost.reduced))
    gather = hardware.seconds("all_gather", (W - 1) / W * cost.parameter_bytes, messages, ranks=W)
    scatter = hardware.seconds("reduce_scatter", (W - 1) / W * cost.gradient_bytes, messages, ranks=W)
    return summed + max(0.0, gather - busy["forward"]) + max(0.0, gather + scatter - busy["backward"])


def _collective_seconds(each: Collective, ranks: int, topology: Topology, share: float = 1.0) -> float:
    """`share` of a collective, among so many ranks that lie beside each other."""
    passes = 2 if each.kind == "all_reduce" else 1
    sent = passes * each.full_bytes * share * (ranks - 1) / ranks
    return topology.at(ranks).seconds(each.kind, sent, each.messages, ranks=ranks)  # type: ignore[arg-type]
