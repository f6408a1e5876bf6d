"""Gather KV: the keys and values come to the queries, which stay (as in Llama 3's context parallelism, Grattafiori et al.,
arXiv:2407.21783, section 3.3.2).

K and V travel packed, in stages of KV heads: the next stage's gather is in flight under this one's attention, and so are the gradients
of the stage before (`runtime/stages.py`). Only two stages' keys are held at a time; the backward gathers them after, and sends the
gradients home in float32. Without a mask that is an all-gather and a reduce-scatter; with one, each rank gets only the rows that its
queries may see, by an all-to-all (`runtime/gathered.py`). Each rank's keys stay where the gather put them: the chunks say what global
positions they have, so no layout is ever undone by a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import Tensor

from autoseq.runtime import runs, strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.gathered import (
    gathered_attention,
    gathered_attention_backward,
    pack_rows,
    send_gradients,
    send_rows,
    somebody_sends,
    sum_gradients,
    takes_all,
)
from autoseq.runtime.groups import ALONE, SequenceGroup, group_of
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.mask import Mask
from autoseq.runtime.posted import Posted, post_all_gather, post_reduce_scatter
from autoseq.runtime.stages import (
    STAGES,
    HeadRange,
    Staged,
    Wanted,
    attend_in_stages,
    cat_heads,
    cut,
    num_heads,
    num_stages,
    pipelined,
    queries_of,
    stage_buffers,
)
from autoseq.runtime.strategy import Cost, Site, Strategy, accumulator_bytes, cost_in, needs_of_site, rows_of_site, task_of
from autoseq.runtime.timeline import WAYS, Exchange, Exchanges, MessageKind, Peers, Phase, Scope, Way, peers_of, pipeline
from autoseq.runtime.traffic import Traffic
from autoseq.runtime.work_counts import Task, part_of


@dataclass(frozen=True, slots=True)
class KeyStage:
    """Some KV heads and the query heads that use them, both counted from the first that are here."""

    kv_heads: HeadRange
    heads: HeadRange


def key_stages(P: int, heads: range, kv_heads: int, heads_per_kv: int, head_bytes: int) -> list[KeyStage]:
    """The stages of some global query heads and the KV heads they use, given the bytes of a participant's rows of one KV head."""
    first, first_kv = heads.start, heads.start // heads_per_kv
    stages = num_stages(head_bytes * kv_heads, kv_heads) if P > 1 else 1
    parts = cut((first_kv, first_kv + kv_heads), stages)
    queries = [queries_of(part, heads_per_kv, (heads.start, heads.stop)) for part in parts]
    return [KeyStage((a - first_kv, b - first_kv), (c - first, d - first)) for (a, b), (c, d) in zip(parts, queries, strict=True)]


def gather_and_attend(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, *, groups: Sequence[str] | None = None, places: Sequence[int] = (), first_head: int = 0
) -> Tensor:
    """Attention to the keys of all participants of a group; see `Settings` for groups and places. The heads are those from `first_head` on.

    Sends (P-1)·B·K·t·(D+Dv) elements forward or, with a mask, fewer; backward the same and as many float32 gradients.
    """
    names = [terms.group] if groups is None else list(groups)
    (group,) = (group_of(name) for name in names)
    head_bytes = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    stages = key_stages(group.size, range(first_head, first_head + q.shape[1]), k.shape[1], terms.heads_per_kv, head_bytes)
    # Ranks that have no heads are in a group with others that have none.
    sends = group if k.shape[1] else ALONE
    return attend_in_stages(_GatherKV(stages, sends, names, list(places), first_head), q, k, v, terms)


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    return gather_and_attend(q, k, v, terms)


attention = attention_function(__name__, _compute)


@dataclass(frozen=True, slots=True)
class _GatherKV(Staged):
    """One attention. It keeps what it was given, out, and each stage's lse."""

    stages: list[KeyStage]
    group: SequenceGroup
    names: list[str]
    places: list[int]
    first_head: int

    def forward(self, terms: Terms, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []

        def work(number: int, keys: Tensor) -> None:
            found.append(gathered_attention(keys, *self._part(number, q, k, v), *self._settings(number, terms)))

        pipelined(len(self.stages), lambda number: self._gather(None, number, terms, q, k, v), work)
        out = cat_heads([out for out, _ in found])
        return out, [q, k, v, out, *(lse for _, lse in found)]

    def backward(
        self, terms: Terms, wanted: Wanted, grad_out: Tensor, kept: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[list[Tensor]]]:
        q, k, v, out, *lses = kept
        dqs: list[Tensor] = []
        shares: list[list[Tensor]] = []

        def work(number: int, keys: Tensor) -> Posted | None:
            part, settings = self._part(number, q, k, v), self._settings(number, terms)
            grad, own_out = (_of(x, self.stages[number].heads) for x in (grad_out, out))
            tensors = (grad, *part, own_out, lses[number], keys)
            dq, grads, share = gathered_attention_backward(wanted.learned, wanted.sinks, *tensors, *settings)
            dqs.append(dq)
            shares.append(share)
            return self._send_home(grads, part, terms, settings) if 1 in wanted.of_qkv or 2 in wanted.of_qkv else None

        landed = pipelined(len(self.stages), lambda number: self._gather(grad_out, number, terms, q, k, v), work)
        pairs = [self._home(number, flat, self._part(number, q, k, v), terms) for number, flat in enumerate(landed)]
        dkv = [cat_heads(parts) for parts in zip(*pairs, strict=True)] if pairs else [None, None]
        return [cat_heads(dqs), *dkv], shares

    def _gather(self, after: Tensor | None, number: int, terms: Terms, q: Tensor, k: Tensor, v: Tensor) -> Posted:
        """Ask for a stage's keys."""
        part = self._part(number, q, k, v)
        if self._takes_all(terms):
            return post_all_gather(self.group, pack_rows(after, *part[1:]))
        return Posted("gather_kv's keys", self.group, send_rows(after, *_own(part), *self._settings(number, terms)))

    def _send_home(self, grads: Tensor, part: list[Tensor], terms: Terms, settings: tuple[Any, ...]) -> Posted:
        if self._takes_all(terms):
            return post_reduce_scatter(self.group, grads)
        return Posted("gather_kv's gradients", self.group, send_gradients(grads, *_own(part), *settings))

    def _home(self, number: int, came: Tensor, part: list[Tensor], terms: Terms) -> tuple[Tensor, Tensor]:
        """dk and dv of a stage."""
        if not self._takes_all(terms):
            return sum_gradients(came, *_own(part), *self._settings(number, terms))
        _, k, v = part
        dk, dv = came[: k.numel()], came[k.numel() :]
        return dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)

    def _takes_all(self, terms: Terms) -> bool:
        return self.group.size == 1 or takes_all(mask_of(terms))

    def _settings(self, number: int, terms: Terms) -> tuple[Any, ...]:
        first_head = self.first_head + self.stages[number].heads[0]
        return terms.flat(self.names, places=self.places, first_head=first_head)

    def _part(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        stage = self.stages[number]
        return [_of(q, stage.heads), _of(k, stage.kv_heads), _of(v, stage.kv_heads)]


def mask_of(terms: Terms) -> Mask:
    """The mask in the settings."""
    _, _, predicate, max_ahead, max_behind, *_ = terms.settings
    return Mask(max_ahead, max_behind, predicate)


def _of(x: Tensor, heads: HeadRange) -> Tensor:
    """Some of the heads."""
    return x if heads == (0, x.shape[1]) else x[:, heads[0] : heads[1]]


def _own(part: list[Tensor]) -> tuple[Tensor, Tensor, int, int]:
    """What the exchange of rows is told."""
    q, k, v = part
    return k, v, q.shape[2], q.shape[1]


class GatherKV(Strategy):
    """Keys and values to every rank, as far as its queries may see them."""

    name = "gather_kv"
    merges_partial_softmaxes = True
    balanced_by_zigzag = True
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        elements = (strategy.P - 1) * strategy.B * strategy.K * strategy.t * (strategy.D + strategy.V)
        return {
            "forward_bytes": elements * strategy.e,
            "backward_bytes": elements * (strategy.e + strategy.a),
            "forward_messages": STAGES,
            "backward_messages": 2 * STAGES,
        }

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        return Strategy.sizes(self, site, group_size, layout, rank) | {STAGES: len(_stages(site, group_size, layout))}

    def exchanged(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        return gather_exchanges(site, group_size, layout, rank, way)

    def phases(self, way: Way) -> tuple[Phase, ...]:
        """The keys of the next stage and the gradients of the one before travel under each stage."""
        return pipeline(STAGES, "keys", "gradients" if way == "backward" else None)

    def tasks(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> list[Task]:
        return gather_tasks(site, group_size, layout, rank, way)

    def buffer_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        if group_size == 1:
            return 0
        t, stages = local_length(site.k_len, group_size, layout), num_key_stages(site, group_size, layout)
        return gather_buffers(site, group_size, t, stages, self.exchanges(site, group_size, layout, rank, way))

    def opaque(self, site: Site, group_size: int, layout: Layout, ways: Sequence[Way] = WAYS) -> dict[str, Traffic]:
        return opaque_traffic(site, cost_in(ways, lambda way: self.exchanges(site, group_size, layout, 0, way)))


def gather_exchanges(
    site: Site, P: int, layout: Layout, rank: int, way: Way, places: tuple[int, ...] = (), first_head: int = 0,
    heads_per_kv: int | None = None, scope: Scope = "flat", ranks: range | None = None,
) -> Exchanges:  # fmt: skip
    """What `rank` sends for a site in one pass: keys, and in a backward their gradients.

    `first_head` is the number of the site's first head in the program, `places` are as for `Holdings`, and `ranks` those of the
    participants, if they are not all there are.
    """
    stages = _stages(site, P, layout, places, first_head, heads_per_kv) if site.kv_heads else []
    sent = [found for stage in stages if (found := _stage_elements(stage, site, P, layout, rank, places, first_head)) is not None]
    kinds: tuple[MessageKind, MessageKind] = ("all_gather", "reduce_scatter") if takes_all(site.mask) else ("all_to_all", "all_to_all")
    # What one sends of keys it gets of gradients.
    everyone = ranks or range(P)
    left, got = (_peers([each[i] for each in sent], everyone, site.element_bytes) for i in range(2))
    found, lost = (_peers([each[i] for each in sent], everyone, accumulator_bytes(site)) for i in (1, 0))
    if takes_all(site.mask):
        found, lost = lost, found  # both go round to the next
    keys = Exchange(kinds[0], scope, sum(peer.bytes for peer in left), len(sent), left, got)
    grads = Exchange(kinds[1], scope, sum(peer.bytes for peer in found), len(sent), found, lost)
    return {"keys": keys} if way == "forward" else {"keys": keys, "gradients": grads}


def _peers(stages: Sequence[Sequence[int]], ranks: range, element_bytes: int) -> Peers:
    """From the elements for each participant, stage by stage."""
    return peers_of((rank, (element_bytes * each[i] for each in stages)) for i, rank in enumerate(ranks))


def gather_tasks(
    site: Site, P: int, layout: Layout, rank: int, way: Way, places: tuple[int, ...] = (), first_head: int = 0,
    heads_per_kv: int | None = None,
) -> list[Task]:  # fmt: skip
    """What `rank` computes: a stage's queries meet the keys of everybody that came. A reduce-scatter adds up gradients by itself."""
    rows, tasks = rows_of_site(site, P, layout, places), []
    for stage in _stages(site, P, layout, places, first_head, heads_per_kv) if site.kv_heads else []:
        heads = range(first_head + stage.heads[0], first_head + stage.heads[1])
        keys, came_home = [tuple(rows.keys(holder)) for holder in range(P)], 0
        leaving, returning = _rows_of(site, P, layout, places), 0
        if not takes_all(site.mask):
            needs = needs_of_site(site, P, layout, places, heads)
            keys = [part_of(held, needed) for held, needed in zip(keys, needs[rank], strict=True)]
            leaving = sum(runs.count(of_one[rank]) for of_one in needs)
            if way == "backward":
                came_home, returning = leaving, sum(map(runs.count, needs[rank]))
        elements = site.batch * num_heads(stage.kv_heads) * (site.head_dim + site.value_dim)
        packed = elements * (leaving * site.element_bytes + returning * accumulator_bytes(site))
        task = task_of(rows, rank, keys, heads, num_heads(stage.kv_heads), came_home * elements)
        tasks.append(replace(task, packed_bytes=packed))
    return tasks


def gather_buffers(site: Site, P: int, t: int, stages: int, sent: Exchanges) -> int:
    """The most that buffers hold in a pass that sends so much, where each of P participants has t rows of keys.

    With a mask there is as much room for what comes as without, and what leaves is packed, one's own part among it.
    """
    elements = site.batch * site.kv_heads * t * (site.head_dim + site.value_dim)
    keys, grads = elements * site.element_bytes, elements * accumulator_bytes(site)
    backward = sent.get("gradients")
    if takes_all(site.mask):
        return stage_buffers(stages, (keys, P * keys), (P * grads, grads) if backward else (0, 0))
    there = (sent["keys"].bytes + keys, P * keys)
    if backward is None:
        return stage_buffers(stages, there, (0, 0))
    return stage_buffers(stages, there, (backward.bytes + grads, P * grads)) + P * grads // stages


def num_key_stages(
    site: Site, P: int, layout: Layout, places: tuple[int, ...] = (), first_head: int = 0, heads_per_kv: int | None = None
) -> int:
    """In how many stages the keys of a site come."""
    return len(_stages(site, P, layout, places, first_head, heads_per_kv)) if site.kv_heads else 1


def _stage_elements(
    stage: KeyStage, site: Site, P: int, layout: Layout, rank: int, places: tuple[int, ...], first_head: int
) -> tuple[list[int], list[int]] | None:
    """How many elements of keys `rank` sends to each participant in a stage, and gets of each; None if nobody sends any.

    All rows go round a ring, so all that is sent goes to the next.
    """
    elements = site.batch * num_heads(stage.kv_heads) * (site.head_dim + site.value_dim)
    if takes_all(site.mask):
        rows = elements * (P - 1) * _rows_of(site, P, layout, places)
        following, before = ((rank + 1) % P, (rank - 1) % P) if P > 1 else (-1, -1)
        return [rows * (other == following) for other in range(P)], [rows * (other == before) for other in range(P)]
    needs = needs_of_site(site, P, layout, places, range(first_head + stage.heads[0], first_head + stage.heads[1]))
    if not somebody_sends(needs):
        return None
    pairs = [(needs[other][rank], needs[rank][other]) if other != rank else ((), ()) for other in range(P)]
    return [elements * runs.count(sent) for sent, _ in pairs], [elements * runs.count(got) for _, got in pairs]


def opaque_traffic(site: Site, cost: Cost) -> dict[str, Traffic]:
    """What of a cost is sent from inside opaque operators, and how."""
    if takes_all(site.mask):
        return {}
    return {"all_to_all": Traffic(cost.forward_messages + cost.backward_messages, cost.step_bytes)}


def _stages(
    site: Site, P: int, layout: Layout, places: tuple[int, ...] = (), first_head: int = 0, heads_per_kv: int | None = None
) -> list[KeyStage]:
    ratio = heads_per_kv or site.heads // site.kv_heads
    head_bytes = site.batch * _rows_of(site, P, layout, places) * (site.head_dim + site.value_dim) * site.element_bytes
    return key_stages(P, range(first_head, first_head + site.heads), site.kv_heads, ratio, head_bytes)


def _rows_of(site: Site, P: int, layout: Layout, places: tuple[int, ...]) -> int:
    """The padded rows of each participant's keys."""
    ranks = len(places) or P
    return local_length(site.k_len, ranks, layout) * ranks // P
