"""Ulysses: sequence for heads, and back (Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509).

One packed all-to-all gives each rank all rows of its share of the heads, whole attention runs there, and one all-to-all brings
the rows home. Any number of heads works: query heads are split as evenly as they go, some ranks may get none, and a rank
receives just the KV heads its query heads use, so grouped heads travel once unless several ranks need them (P > K).

Large messages go in stages, each some heads of every rank's share, so that they travel while the attention of other heads is computed
(`runtime/stages.py`); the bytes stay the same. A stage has whole groups of heads. Where no rank has more than one KV head, that comes
with the first stage and its gradient leaves with the last.

The attention in the middle is the same op as `local`'s; a KV head that several ranks used gets its gradient summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import Tensor

from autoseq.runtime import strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.extrapolation import Case
from autoseq.runtime.groups import SequenceGroup, group_of
from autoseq.runtime.head_costs import (
    HEADS,
    OWN_HEADS,
    OWN_KV_HEADS,
    ROWS,
    SENT_KV_HEADS,
    head_buffers,
    head_exchanges,
    head_formulas,
    packed_bytes,
)
from autoseq.runtime.head_exchange import Exchange, Landed, landed_heads
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.local import whole_attention
from autoseq.runtime.posted import Posted
from autoseq.runtime.stages import (
    STAGES,
    HeadRange,
    Staged,
    Wanted,
    add_up,
    attend_in_stages,
    cut,
    num_heads,
    num_stages,
    pipelined,
    queries_of,
    stage_buffers,
)
from autoseq.runtime.strategy import Site, Strategy, rows_of_site, saved_bytes, saved_formula
from autoseq.runtime.timeline import WAYS, Exchanges, Phase, Way, pipeline
from autoseq.runtime.traffic import Traffic
from autoseq.runtime.work_counts import Task


@dataclass(frozen=True, slots=True)
class HeadStage:
    """Some heads of every rank's share: query heads and the KV heads they use, by rank, and whether the latter travel with them."""

    heads: list[HeadRange]
    kv_heads: list[HeadRange]
    brings_keys: bool = True  # else those of the stage before are used again
    returns_keys: bool = True  # else their gradients are added to those of the next stage

    @property
    def asked(self) -> list[int]:
        """Which of q, k and v come for it."""
        return [0, 1, 2] if self.brings_keys else [0]


def head_stages(P: int, heads: int, kv_heads: int, query_bytes: int, key_bytes: int) -> list[HeadStage]:
    """The stages, given the bytes of a rank's rows of one query head, and of one KV head's keys and values."""
    ratio = heads // kv_heads
    own, covers = head_shares(P, heads, kv_heads)
    most, most_keys = (max(map(num_heads, of_ranks)) for of_ranks in (own, covers))
    message_bytes = query_bytes * heads + key_bytes * sum(map(num_heads, covers))
    stages = num_stages(message_bytes, most_keys if most_keys > 1 else most) if P > 1 else 1
    if most_keys > 1:
        parts = [cut(cover, stages) for cover in covers]
        queries = [[queries_of(part, ratio, share) for part in of_rank] for of_rank, share in zip(parts, own, strict=True)]
        return [HeadStage([each[i] for each in queries], [each[i] for each in parts]) for i in range(stages)]
    queries = [cut(share, stages) for share in own]
    return [HeadStage([each[i] for each in queries], covers, i == 0, i == stages - 1) for i in range(stages)]


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """With evenly split heads it sends (P-1)/P of q, out and the KV heads (times max(1, P/K)); backward the same."""
    seq = group_of(terms.group)
    query_bytes = q.shape[0] * q.shape[2] * q.shape[3] * q.element_size()
    key_bytes = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    stages = head_stages(seq.size, q.shape[1], k.shape[1], query_bytes, key_bytes)
    return attend_in_stages(_Ulysses(stages, terms.layout, seq), q, k, v, terms)


attention = attention_function(__name__, _compute)


@dataclass(frozen=True, slots=True)
class _Ulysses(Staged):
    """One attention. It keeps q, k, v, out and lse of each stage, all rows of this rank's heads."""

    stages: list[HeadStage]
    layout: Layout
    group: SequenceGroup

    def forward(self, terms: Terms, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept: list[Tensor] = []

        def post(number: int) -> Posted:
            asked = self.stages[number].asked
            return self._exchange(number, asked).post_rows([(q, k, v)[i] for i in asked])

        def work(number: int, flat: Tensor) -> Posted:
            asked = self.stages[number].asked
            rows = self._exchange(number, asked).arrived_rows(flat, [(q, k, v)[i] for i in asked])
            rows += [] if self.stages[number].brings_keys else kept[-4:-2]
            out, lse, _ = whole_attention.forward(*rows, *self._settings(number, terms))
            kept.extend((*rows, out, lse))
            return self._exchange(number, [0]).post_heads([out])

        flats = pipelined(len(self.stages), post, work)
        arrivals = [Landed(self._exchange(number, [0]), [0], flat) for number, flat in enumerate(flats)]
        return landed_heads(arrivals, [(*q.shape[:3], v.shape[3])])[0], kept

    def backward(
        self, terms: Terms, wanted: Wanted, grad_out: Tensor, kept: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[list[Tensor]]]:
        shares: list[list[Tensor]] = []
        homes: list[tuple[Exchange, list[int]]] = []
        of_keys: list[Tensor] = []  # dk and dv of keys that several stages use

        def post(number: int) -> Posted:
            return self._exchange(number, [0]).post_rows([grad_out])

        def work(number: int, flat: Tensor) -> Posted | None:
            stage, of_stage = self.stages[number], kept[5 * number : 5 * number + 5]
            (grad,) = self._exchange(number, [0]).arrived_rows(flat, [grad_out])
            tensors = (grad, *of_stage, of_stage[1].new_empty(0))
            dq, *dkv, share = whole_attention.backward(wanted.learned, wanted.sinks, *tensors, *self._settings(number, terms))
            shares.append(share)
            if not (stage.brings_keys and stage.returns_keys):
                of_keys[:] = [add_up(parts) for parts in zip(dkv, *([of_keys] if of_keys else []), strict=True)]
                dkv = [total.to(part.dtype) for total, part in zip(of_keys, dkv, strict=True)]
            home = [i for i in wanted.of_qkv if i == 0 or stage.returns_keys]
            if not home:
                return None
            homes.append((self._exchange(number, home), home))
            return homes[-1][0].post_heads([(dq, *dkv)[i] for i in home])

        flats = pipelined(len(self.stages), post, work)
        shapes = self._shapes(grad_out, *kept[:3])
        arrivals = [Landed(sent, [wanted.of_qkv.index(i) for i in home], flat) for (sent, home), flat in zip(homes, flats, strict=True)]
        found = dict(zip(wanted.of_qkv, landed_heads(arrivals, [shapes[i] for i in wanted.of_qkv]), strict=True))
        return [found.get(i) for i in range(3)], shares

    def _exchange(self, number: int, tensors: Sequence[int]) -> Exchange:
        """Of a stage's query heads (0), and heads of keys (1) and values (2)."""
        stage = self.stages[number]
        return Exchange([stage.kv_heads if i else stage.heads for i in tensors], self.layout, self.group)

    def _settings(self, number: int, terms: Terms) -> tuple[Any, ...]:
        """Attention of all rows in global order: one chunk, and no group to ask."""
        return terms.flat([], layout="contiguous", first_head=self.stages[number].heads[self.group.rank][0])

    def _shapes(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[int, ...]]:
        """Of this rank's rows of all heads of q, k and v."""
        kv_heads, t = self.stages[-1].kv_heads[-1][1], k.shape[2] // self.group.size
        return [(*grad_out.shape[:3], q.shape[3]), *((x.shape[0], kv_heads, t, x.shape[3]) for x in (k, v))]


class Ulysses(Strategy):
    """Whole sequence on every rank, for a share of the heads."""

    name = "ulysses"
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        """Exact for any split of the heads; with h = H/P and n = (P-1) max(1, K/P), g = max(1, K/P) they are the even case."""
        return {
            **{f"{way}_bytes": sum(head_formulas(way).values(), start=sympy.Integer(0)) for way in WAYS},
            **{f"{way}_messages": 2 * STAGES for way in WAYS},
        }

    def work_formulas(self) -> dict[str, sympy.Expr]:
        s, t = (strategy.P * rows for rows in (strategy.s, strategy.t))
        return {"pairs": strategy.B * OWN_HEADS * s * t, "kept_bytes": saved_formula(OWN_HEADS, OWN_KV_HEADS, s, t)}

    def opaque(self, site: Site, group_size: int, layout: Layout, ways: Sequence[Way] = WAYS) -> dict[str, Traffic]:
        return {}

    def cases(self, site: Site, group_size: int, layout: Layout, rank: int, together: int = 1) -> tuple[Case, ...]:
        """Who sends which heads takes no longer among many ranks."""
        return (Case(site, group_size, layout, rank),)

    def exchanged(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        shares = num_heads_of_ranks(group_size, site.heads, site.kv_heads)
        return head_exchanges(way, self.sizes(site, group_size, layout, rank), shares, rank, range(group_size), "flat")

    def phases(self, way: Way) -> tuple[Phase, ...]:
        """The rows of the next stage and the heads of the one before travel under each stage."""
        return pipeline(STAGES, ROWS, HEADS)

    def tasks(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> list[Task]:
        rows = rows_of_site(site, 1, "contiguous")
        padded = rows.q_len < local_length(site.q_len, group_size, layout) * group_size
        stages = ((stage.heads[rank], stage.kv_heads[rank]) for stage in _stages_of(site, group_size, layout))
        queries, keys = tuple(rows.queries(0)), tuple(rows.keys(0))
        return [Task(queries, (keys,), range(*heads), num_heads(kv_heads), keys, padded) for heads, kv_heads in stages]

    def kept_bytes(self, site: Site, group_size: int, layout: Layout, rank: int) -> int:
        """All rows of this rank's heads."""
        s, t = (local_length(n, group_size, layout) * group_size for n in (site.q_len, site.k_len))
        heads, kv_heads = (num_heads(of_ranks[rank]) for of_ranks in head_shares(group_size, site.heads, site.kv_heads))
        return saved_bytes(replace(site, heads=heads, kv_heads=kv_heads), s, t)

    def buffer_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        if group_size == 1:
            return 0
        sizes = self.sizes(site, group_size, layout, rank)
        return stage_buffers(sizes[STAGES], *head_buffers(way, sizes))

    def packed_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        return packed_bytes(way, self.sizes(site, group_size, layout, rank))

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        heads, kv_heads = (list(map(num_heads, each)) for each in head_shares(group_size, site.heads, site.kv_heads))
        known = Strategy.sizes(self, site, group_size, layout, rank)
        return known | {
            OWN_HEADS: heads[rank],
            OWN_KV_HEADS: kv_heads[rank],
            SENT_KV_HEADS: sum(kv_heads) - kv_heads[rank],
            STAGES: len(_stages_of(site, group_size, layout)),
        }


def _stages_of(site: Site, P: int, layout: Layout) -> list[HeadStage]:
    query_bytes = site.batch * local_length(site.q_len, P, layout) * site.head_dim * site.element_bytes
    key_bytes = site.batch * local_length(site.k_len, P, layout) * (site.head_dim + site.value_dim) * site.element_bytes
    return head_stages(P, site.heads, site.kv_heads, query_bytes, key_bytes)


def head_shares(P: int, heads: int, kv_heads: int) -> tuple[list[HeadRange], list[HeadRange]]:
    """The query heads of each of P ranks, and the KV heads these use."""
    own = [query_heads(rank, P, heads) for rank in range(P)]
    return own, [covering_kv_heads(each, heads // kv_heads) for each in own]


def num_heads_of_ranks(P: int, heads: int, kv_heads: int) -> list[tuple[int, int]]:
    """How many query heads and KV heads each of P ranks has."""
    return [(num_heads(own), num_heads(used)) for own, used in zip(*head_shares(P, heads, kv_heads), strict=True)]


def query_heads(rank: int, P: int, heads: int) -> HeadRange:
    """The share of `rank`: consecutive heads, floor or ceil of heads / P of them."""
    return rank * heads // P, (rank + 1) * heads // P


def covering_kv_heads(heads: HeadRange, ratio: int) -> HeadRange:
    """The KV heads that some query heads use, with `ratio` query heads for each KV head."""
    start, end = heads
    return (start // ratio, (end - 1) // ratio + 1) if start < end else (0, 0)
