"""Which keys ranks need of each other, read off the dense mask: the oracle of `runtime/needs.py`."""

from __future__ import annotations

from autoseq.runtime.holdings import Holdings
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.needs import Rows
from autoseq.runtime.runs import Runs
from dense_attention import Case


def as_set(of: Runs) -> set[int]:
    return {row for start, rows in of for row in range(start, start + rows)}


def dense_needs(case: Case, rows: Rows, P: int) -> list[list[set[int]]]:
    """Read off the dense mask: the local rows of the holder's keys that some query of the asker may see."""
    allowed = case.mask_case().dense.expand(case.batch, case.heads, case.q_len, case.k_len).any(0).any(0)
    queries = [[start + i for _, start, n in rows.queries(p) for i in range(n)] for p in range(P)]
    keys = [{start + i: local + i for local, start, n in rows.keys(p) for i in range(n)} for p in range(P)]
    return [[{local for k, local in keys[o].items() if bool(allowed[queries[p], k].any())} for o in range(P)] for p in range(P)]


def rows_of(case: Case, P: int, layout: Layout) -> Rows:
    held = Holdings.of(P, layout)
    s, t = (local_length(n, P, layout) for n in (case.q_len, case.k_len))
    return Rows(held, held, s, t, case.q_len, case.k_len)
