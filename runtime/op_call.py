"""One call of an attention op: what it takes, as its schema has it, and what follows from that.

`attention_op` and `gathered` register the ops; a strategy's forward and backward see a `Call`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from autoseq.runtime.blocks import Chunk
from autoseq.runtime.groups import SequenceGroup, group_of
from autoseq.runtime.holdings import Holdings
from autoseq.runtime.layout import Layout
from autoseq.runtime.mask import Mask
from autoseq.runtime.needs import Needs, NeedTerms, Rows, needs_of
from autoseq.runtime.tiles import EmptyRows, Problem, fills_empty_rows

SETTINGS = (
    "Tensor[] captures, Tensor? sinks, Tensor? seed, float scale, str score, str predicate, SymInt? max_ahead, SymInt? max_behind, "
    "str empty_rows, float dropout_p, SymInt q_len, SymInt k_len, SymInt first_head, SymInt heads_per_kv, str layout, int[] places, "
    "bool gathered, str[] groups"
)
# A custom op cannot leave a result out, so the gradients that not every call asks for come in a list: of the captures numbered in
# `learned`, then of the sinks.
ASKED = "int[] learned, bool learns_sinks, Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor kept"


class Settings(NamedTuple):
    """What an op takes besides q, k and v, in the order of its schema.

    `groups` are the participants' groups, the outer one first (none: one participant), `places` the ranks whose shards each of
    them holds (empty: its own), and `gathered` says that k and v hold the rows of all participants, one after the other.
    """

    captures: list[Tensor]
    sinks: Tensor | None
    seed: Tensor | None
    scale: float
    score: str
    predicate: str
    max_ahead: int | None
    max_behind: int | None
    empty_rows: EmptyRows
    dropout_p: float
    q_len: int
    k_len: int
    first_head: int
    heads_per_kv: int
    layout: Layout
    places: list[int]
    gathered: bool
    groups: list[str]

    @property
    def fills_empty_rows(self) -> bool:
        """Whether a row without keys is worth something that depends on all of them."""
        return fills_empty_rows(self.empty_rows, has_sinks=self.sinks is not None)

    def problem(self) -> Problem:
        captures = [capture.detach() for capture in self.captures]
        sinks = None if self.sinks is None else self.sinks.detach()
        return Problem(
            Mask(self.max_ahead, self.max_behind, self.predicate), captures, self.scale, self.score, sinks, self.seed, self.dropout_p,
            self.empty_rows, self.first_head, self.heads_per_kv,
        )  # fmt: skip


class Asked(NamedTuple):
    """What a backward op takes before the settings, in the order of its schema; `kept` is what its forward has kept for it."""

    learned: list[int]
    learns_sinks: bool
    grad_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    kept: Tensor

    @classmethod
    def of(cls, args: Sequence[Any]) -> tuple[Asked, Settings]:
        """All that a backward op takes."""
        number = len(cls._fields)
        return cls(*args[:number]), Settings(*args[number:])

    def among(self, settings: Settings) -> list[Tensor]:
        """The captures and sinks whose gradients are asked for."""
        sinks = [settings.sinks] if self.learns_sinks and settings.sinks is not None else []
        return [settings.captures[i] for i in self.learned] + sinks


@dataclass(frozen=True)
class Call:
    """One call of an attention op: local q [B,H,s,D], k [B,K,t,D], v [B,K,t,Dv], and what to compute with them."""

    q: Tensor
    k: Tensor
    v: Tensor
    problem: Problem
    rows: Rows
    groups: tuple[SequenceGroup, ...]
    gathered: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Call:
        groups = tuple(group_of(name) for name in settings.groups)
        participants = prod(group.size for group in groups)
        held = Holdings.of(participants, settings.layout, tuple(settings.places))
        t = k.shape[2] // participants if settings.gathered else k.shape[2]
        rows = Rows(held, held, q.shape[2], t, settings.q_len, settings.k_len)
        return cls(q.detach(), k.detach(), v.detach(), settings.problem(), rows, groups, settings.gathered)

    @property
    def group(self) -> SequenceGroup:
        """The only group of participants."""
        (group,) = self.groups
        return group

    @property
    def participants(self) -> int:
        return prod(group.size for group in self.groups)

    @cached_property
    def me(self) -> int:
        """This rank among the participants."""
        me = 0
        for group in self.groups:
            me = me * group.size + group.rank
        return me

    @cached_property
    def queries(self) -> list[Chunk]:
        """This rank's valid rows."""
        return self.rows.queries(self.me)

    @cached_property
    def paddings(self) -> list[tuple[int, int]]:
        """This rank's runs of padding rows: (local start, local end)."""
        spans = self.rows.q_holdings.spans(self.me, self.rows.s, self.rows.q_len)
        return [(local + valid, local + padded) for local, _, valid, padded in spans if valid < padded]

    @property
    def padded_queries(self) -> list[Chunk]:
        """This rank's valid rows, and the first padding row of each chunk in the place of the last valid position."""
        return self.queries + [(local, self.rows.q_len - 1, 1) for local, _ in self.paddings]

    def keys_of(self, participant: int) -> list[Chunk]:
        """The valid keys that a participant holds, as they lie in its rows; in gathered ones, as they lie there."""
        first = participant * self.rows.t if self.gathered else 0
        return [(first + local, start, rows) for local, start, rows in self.rows.keys(participant)]

    @cached_property
    def all_keys(self) -> list[Chunk]:
        """The valid keys of every participant."""
        return [chunk for participant in range(self.participants) for chunk in self.keys_of(participant)]

    @cached_property
    def terms(self) -> NeedTerms:
        """What decides who needs what."""
        problem = self.problem
        heads = range(problem.first_head, problem.first_head + self.q.shape[1])
        return NeedTerms(problem.mask, problem.captures, self.q.shape[0], heads, problem.fills_empty_rows, problem.score)

    @cached_property
    def needs(self) -> Needs:
        """Which keys each participant needs of each other."""
        return needs_of(self.terms, self.rows, self.participants)
