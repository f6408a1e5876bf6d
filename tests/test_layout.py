"""Which rank holds which rows, as tables, and the reorderings as properties."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoseq.runtime.layout import (
    Layout,
    chunk_ranges,
    grain,
    local_length,
    num_chunks,
    rank_chunks,
    rank_positions,
    to_global,
    to_ranked,
)

LAYOUTS = ["contiguous", "zigzag"]


@pytest.mark.parametrize(
    ("n", "P", "layout", "expected"),
    [
        pytest.param(8, 2, "contiguous", 4, id="divides evenly"),
        pytest.param(9, 2, "contiguous", 5, id="one row too many pads every rank alike"),
        pytest.param(1, 4, "contiguous", 1, id="fewer rows than ranks"),
        pytest.param(0, 4, "contiguous", 0, id="no rows"),
        pytest.param(8, 2, "zigzag", 4, id="zigzag divides evenly"),
        pytest.param(9, 2, "zigzag", 6, id="zigzag rounds up to twice the ranks"),
        pytest.param(5, 1, "contiguous", 5, id="one rank needs no padding"),
        pytest.param(5, 1, "zigzag", 6, id="one zigzag rank still has two equal chunks"),
    ],
)
def test_local_length(n: int, P: int, layout: Layout, expected: int) -> None:
    assert local_length(n, P, layout) == expected


@pytest.mark.parametrize(
    ("layout", "P", "expected"),
    [
        pytest.param("contiguous", 3, [[0], [1], [2]], id="contiguous: rank r has chunk r"),
        pytest.param("zigzag", 3, [[0, 5], [1, 4], [2, 3]], id="zigzag: an early and a late chunk"),
        pytest.param("zigzag", 1, [[0, 1]], id="zigzag on one rank is the plain order"),
    ],
)
def test_rank_chunks(layout: Layout, P: int, expected: list[list[int]]) -> None:
    assert [rank_chunks(rank, P, layout) for rank in range(P)] == expected


@pytest.mark.parametrize(
    ("rank", "P", "n", "layout", "expected"),
    [
        pytest.param(1, 2, 8, "contiguous", [(0, 4, 4)], id="all rows valid"),
        pytest.param(1, 2, 7, "contiguous", [(0, 4, 3)], id="padding at the end of the last rank"),
        pytest.param(3, 4, 2, "contiguous", [(0, 3, 0)], id="a rank that holds padding only"),
        pytest.param(0, 2, 7, "zigzag", [(0, 0, 2), (2, 6, 1)], id="zigzag: rank 0 has the padded end"),
        pytest.param(1, 2, 7, "zigzag", [(0, 2, 2), (2, 4, 2)], id="zigzag: the last rank has the middle"),
        pytest.param(0, 2, 1, "zigzag", [(0, 0, 1), (1, 3, 0)], id="zigzag: one row in all"),
    ],
)
def test_chunk_ranges(rank: int, P: int, n: int, layout: Layout, expected: list[tuple[int, int, int]]) -> None:
    assert chunk_ranges(rank, P, local_length(n, P, layout), n, layout) == expected


sizes = {"n": st.integers(0, 40), "P": st.integers(1, 6), "layout": st.sampled_from(LAYOUTS)}


@given(**sizes)
def test_every_row_is_held_exactly_once(n: int, P: int, layout: Layout) -> None:
    s = local_length(n, P, layout)
    held = [
        row
        for rank in range(P)
        for _, start, valid in chunk_ranges(rank, P, s, n, layout)
        for row in range(start, start + valid)
    ]
    assert sorted(held) == list(range(n))


@given(**sizes)
def test_padding_stands_at_the_end_of_each_rank(n: int, P: int, layout: Layout) -> None:
    for rank in range(P):
        valid = [p < n for p in rank_positions(rank, P, local_length(n, P, layout), layout, "cpu").tolist()]
        assert valid == sorted(valid, reverse=True)


@given(**sizes)
def test_positions_agree_with_chunk_ranges(n: int, P: int, layout: Layout) -> None:
    s = local_length(n, P, layout)
    for rank in range(P):
        positions = rank_positions(rank, P, s, layout, "cpu").tolist()
        expected = [
            start + i for _, start, _ in chunk_ranges(rank, P, s, n, layout) for i in range(s // num_chunks(layout))
        ]
        assert positions == expected


@given(chunk=st.integers(0, 5), P=st.integers(1, 6), layout=st.sampled_from(LAYOUTS), dim=st.sampled_from([0, 1, -1, -2]))
def test_reorderings_undo_each_other(chunk: int, P: int, layout: Layout, dim: int) -> None:
    rows = chunk * grain(P, layout)
    x = torch.arange(3 * rows).reshape((3, rows) if dim in (1, -1) else (rows, 3))
    assert torch.equal(to_global(to_ranked(x, dim, P, layout), dim, P, layout), x)
    assert torch.equal(to_ranked(to_global(x, dim, P, layout), dim, P, layout), x)


@given(chunk=st.integers(1, 5), P=st.integers(1, 6), layout=st.sampled_from(LAYOUTS))
def test_ranked_order_is_each_ranks_rows_in_turn(chunk: int, P: int, layout: Layout) -> None:
    s = chunk * num_chunks(layout)
    by_rank = torch.cat([rank_positions(rank, P, s, layout, "cpu") for rank in range(P)])
    assert torch.equal(to_ranked(torch.arange(P * s), 0, P, layout), by_rank)
    assert torch.equal(to_global(by_rank, 0, P, layout), torch.arange(P * s))


@pytest.mark.parametrize("reorder", [to_global, to_ranked])
def test_reorderings_are_differentiable(reorder: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reorder(x, 1, 3, "zigzag"), x)
