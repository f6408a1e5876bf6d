"""flex_attention opened: what its mask and score functions compute, masks read as formulas, hand-made blocks, learned tables."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, create_mask, flex_attention

from autoseq.passes.find_attention import find_attention, is_attention
from autoseq.passes.normalize import drop_noops
from autoseq.passes.read_masks import read_masks
from graphs import Traced, trace
from ranks import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    # Dynamo instantiates the autograd function behind a lookup.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning"),
]

S = 150  # more than one block of 128, and no multiple of it
TOLERANCE = 1e-5  # float32; sums over up to 150 keys in another order


@pytest.fixture(autouse=True)
def gradients_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's CPU kernel of flex_attention has no backward, so torch refuses before autoseq sees the program."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def leaves(B: int = 2, H: int = 4, K: int = 4, q_len: int = S, k_len: int = S, batches_of_keys: int = 2) -> tuple[Tensor, ...]:
    shapes = (B, H, q_len, 8), (batches_of_keys, K, k_len, 8), (batches_of_keys, K, k_len, 6)
    return tuple(floats(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))


def check_opened(fn: Callable[..., Any], *args: Any, dynamic: bool = False, tolerance: float = TOLERANCE) -> Traced:
    """The opened, normalized graph has the values and gradients of the program itself."""
    traced = trace(fn, *args, dynamic=dynamic)
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in traced.normal.graph.nodes)
    check_numbers(fx.Interpreter(traced.normal).run(*traced.inputs)[0], fn(*args), [x for x in traced.inputs if _learns(x)], tolerance)
    return traced


def _learns(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def check_numbers(actual: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    weights = floats(*expected.shape, seed=7)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True) for out in (actual, expected))
    for a, e in zip((actual, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item())


def formulas(traced: Traced) -> list[str]:
    """The mask of each attention that is found."""
    gm = traced.normal
    drop_noops(gm)
    find_attention(gm)
    read_masks(gm)
    return [node.meta["attention"]["mask"] for node in gm.graph.nodes if is_attention(node)]


# Masks ----------------------------------------------------------------------------------------------------------------

DOCUMENTS = torch.arange(S) // 40
ALLOWED = floats(2, 4, S, S) > 0


MASKS = [
    pytest.param(lambda b, h, q, k: q >= k, "k <= q", id="causal"),
    pytest.param(lambda b, h, q, k: (q >= k) & (q - k < 20), "(k <= q) & (k > q - 20)", id="a window"),
    pytest.param(lambda b, h, q, k: (q >= k) & (DOCUMENTS[q] == DOCUMENTS[k]), "(k <= q) & Eq(G.DOCUMENTS(q), G.DOCUMENTS(k))",
                 id="documents"),
    pytest.param(lambda b, h, q, k: (k < 30) | (q >= k), "((k <= q) | (k < 30))", id="a prefix"),
    pytest.param(lambda b, h, q, k: (q >= k) & (q > 9), "(k <= q) & (q > 9)", id="rows without a key"),
    pytest.param(lambda b, h, q, k: torch.where(h < 2, q >= k, q <= k), None, id="another mask for each head"),
    pytest.param(lambda b, h, q, k: ALLOWED[b, h, q, k] | (q == k), None, id="a table"),
]  # fmt: skip


@pytest.mark.parametrize(("mask_mod", "formula"), MASKS)
@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
def test_a_mask_mod_has_the_programs_numbers_and_is_read(mask_mod: Any, formula: str | None, inside: bool) -> None:
    outside = create_block_mask(mask_mod, 2, 4, S, S, device="cpu")

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=create_block_mask(mask_mod, 2, 4, S, S, device="cpu") if inside else outside)

    read = formulas(check_opened(fn, *leaves()))
    assert len(read) == 1 and formula in (None, read[0])


def test_what_a_mask_mod_closes_over_has_a_name() -> None:
    def documents(ids: Tensor) -> Any:
        return lambda b, h, q, k: ids[q] == ids[k]

    outside = create_block_mask(documents(DOCUMENTS), None, None, S, S, device="cpu")

    def fn(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks)

    assert formulas(trace(fn, *leaves(), outside)) == ["Eq(blocks.mask_mod.0(q), blocks.mask_mod.0(k))"]


def test_a_table_read_index_by_index() -> None:
    outside = create_block_mask(lambda b, h, q, k: ALLOWED[b][h][q][k] | (q == k), 2, 4, S, S, device="cpu")  # Dynamo cannot trace this
    check_opened(lambda q, k, v: flex_attention(q, k, v, block_mask=outside), *leaves())


def test_without_a_mask_every_key_is_seen() -> None:
    assert formulas(check_opened(lambda q, k, v: flex_attention(q, k, v, scale=0.3), *leaves())) == ["all"]


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param(dict(K=2), id="grouped heads"),
        pytest.param(dict(K=1), id="one head of keys"),
        pytest.param(dict(q_len=140, k_len=90), id="fewer keys than queries"),
        pytest.param(dict(batches_of_keys=1), id="one batch of keys for all queries"),
    ],
)
@pytest.mark.parametrize("score_mod", [None, lambda s, b, h, q, k: s * 0.5 + h], ids=["no score_mod", "a score_mod"])
def test_shapes(shapes: dict[str, int], score_mod: Any) -> None:
    inputs = leaves(**shapes)
    mask = create_block_mask(lambda b, h, q, k: q + 3 >= k, 2, None, inputs[0].shape[2], inputs[1].shape[2], device="cpu")
    check_opened(lambda q, k, v: flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=True), *inputs)


@pytest.mark.parametrize("with_score", [False, True])
def test_symbolic_lengths(with_score: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, score_mod=(lambda s, b, h, i, j: s - (i - j)) if with_score else None, block_mask=mask)

    traced = check_opened(fn, *leaves(), dynamic=True)
    assert any(isinstance(node.meta.get("val"), torch.SymInt) for node in traced.normal.graph.nodes)


# Scores ---------------------------------------------------------------------------------------------------------------

BIAS, POSITIONS = floats(4, 2 * S - 1).requires_grad_(), floats(2, 1, S, S).requires_grad_()
SCORES = [
    pytest.param(lambda s, b, h, q, k: s + (k - q) * torch.exp2(-(h + 1) * 2.0), [], id="ALiBi"),
    pytest.param(lambda s, b, h, q, k: 20 * torch.tanh(s / 20), [], id="softcap"),
    pytest.param(lambda s, b, h, q, k: s + BIAS[h, q - k + S - 1], [BIAS], id="a learned table of relative positions"),
    pytest.param(lambda s, b, h, q, k: s + POSITIONS[b, 0, q, k], [POSITIONS], id="a learned bias, one number of its index fixed"),
    pytest.param(lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")), [], id="a mask written as a score"),
]


@pytest.mark.parametrize(("score_mod", "tables"), SCORES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_score_mod_has_the_programs_numbers(score_mod: Any, tables: list[Tensor], masked: bool) -> None:
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q != 7), None, None, S, S, device="cpu") if masked else None
    traced = check_opened(lambda q, k, v: flex_attention(q, k, v, score_mod=score_mod, block_mask=mask), *leaves())
    for table in tables:
        assert any(x is table for x in traced.inputs), "its gradient is compared"


@pytest.mark.parametrize("masked", [False, True])
def test_a_score_mod_that_rounds(masked: bool) -> None:
    """A float16 score of up to 32 is off by 1/64, so weights and gradients are off by that part of themselves."""
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, S, S, device="cpu") if masked else None
    check_opened(lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s.half() * 8, mask), *leaves(), tolerance=1 / 64)


@pytest.mark.parametrize("masked", [False, True])
def test_low_precision_scores_in_float32(masked: bool) -> None:
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in leaves(K=2))
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, S, S, device="cpu") if masked else None
    step = 2**-7  # one unit in the last place of bfloat16, to which results and gradients are rounded
    check_opened(lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s + h, mask, enable_gqa=True), q, k, v, tolerance=step)


@pytest.mark.parametrize("ambient", [False, True])
def test_autocast_reaches_queries_keys_and_values_only(ambient: bool) -> None:
    """Scores are float32 in the operator; rounded to bfloat16 they would be off by far more."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * 8)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * 8)

    inputs = leaves()
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        traced = trace(plain if ambient else fn, *inputs)
        actual, expected = fx.Interpreter(traced.normal).run(*traced.inputs)[0], (plain if ambient else fn)(*inputs)
    assert actual.dtype == expected.dtype == torch.bfloat16
    step = 2**-7  # one unit in the last place of bfloat16, to which gradients are rounded on their way
    check_numbers(actual.float(), expected.float(), [x for x in traced.inputs if _learns(x)], step)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_score_mod_autocast_casts_the_one_attention(masked: bool) -> None:
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, S, S, device="cpu") if masked else None

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flex_attention(q, k, v, block_mask=mask)

    inputs = leaves()
    traced = trace(fn, *inputs)
    actual, expected = fx.Interpreter(traced.normal).run(*traced.inputs)[0], fn(*inputs)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)  # both round weights and output to bfloat16's 8 bits


def test_the_log_sum_exp_is_computed_beside() -> None:
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q != 3), None, None, S, S, device="cpu")

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
        assert aux.lse is not None
        return torch.cat([out, torch.where(aux.lse > -1e30, aux.lse, 0).unsqueeze(-1)], -1)  # rows without a key: -inf

    assert formulas(check_opened(fn, *leaves())) == ["(k <= q) & Ne(q, 3)"]


def test_lse_without_keys_is_minus_infinity() -> None:
    mask = create_block_mask(lambda b, h, q, k: q != 3, None, None, S, S, device="cpu")

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))[1].lse

    inputs = leaves()
    traced = trace(fn, *inputs)
    torch.testing.assert_close(fx.Interpreter(traced.normal).run(*traced.inputs)[0], fn(*inputs), rtol=TOLERANCE, atol=TOLERANCE)


# Blocks ---------------------------------------------------------------------------------------------------------------


def by_hand(mask_mod: Any = None, full: bool = False, counts: Any = ((1,), (2,)), columns: Any = ((0, 1), (1, 0))) -> BlockMask:
    """Two blocks of 128 each way: the first queries see the first block of keys, the second ones both."""
    listed = torch.tensor(counts, dtype=torch.int32).reshape(1, 1, 2), torch.tensor(columns, dtype=torch.int32).reshape(1, 1, 2, 2)
    none = tuple(torch.zeros_like(x) for x in listed)
    return BlockMask.from_kv_blocks(*(none + listed if full else listed + none), BLOCK_SIZE=128, mask_mod=mask_mod, seq_lengths=(S, S))


def dense(blocks: BlockMask, mask_mod: Any) -> Tensor:
    """The mask as torch's compiled kernels apply it."""
    at = torch.arange(S) // 128
    q, k = at[:, None], at[None]
    fine = create_mask(mask_mod, 1, 1, S, S, device="cpu") if mask_mod else torch.ones(1, 1, S, S, dtype=torch.bool)
    seen = torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    for table, counts, columns in ((seen[0], blocks.kv_num_blocks, blocks.kv_indices),
                                   (seen[1], blocks.full_kv_num_blocks, blocks.full_kv_indices)):  # fmt: skip
        assert counts is not None and columns is not None
        for row in range(2):
            table[row, columns[0, 0, row, : counts[0, 0, row]].long()] = True
    return seen[0][q, k] & fine | seen[1][q, k]


@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
@pytest.mark.parametrize("full", [False, True], ids=["partial blocks", "full blocks"])
@pytest.mark.parametrize("mask_mod", [None, lambda b, h, q, k: (q + k) % 3 > 0], ids=["no mask_mod", "a mask_mod"])
def test_blocks_listed_by_hand_hide_what_they_do_not_list(mask_mod: Any, full: bool, inside: bool) -> None:
    blocks = by_hand(mask_mod, full)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=by_hand(mask_mod, full) if inside else blocks)

    inputs = leaves()
    traced = trace(fn, *inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=dense(blocks, mask_mod))
    actual = fx.Interpreter(traced.normal).run(*traced.inputs)[0]
    check_numbers(actual, expected, [x for x in traced.inputs if _learns(x)], TOLERANCE)


@pytest.mark.parametrize("dynamic", [False, True])
def test_blocks_that_agree_with_their_mask_mod_are_dropped(dynamic: bool) -> None:
    blocks = by_hand(lambda b, h, q, k: q >= k)
    traced = trace(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks), *leaves(), dynamic=dynamic)
    assert formulas(traced) == ["k <= q"]


# Ranks ----------------------------------------------------------------------------------------------------------------


def causal_documents(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & (DOCUMENTS[q] == DOCUMENTS[k])


class Flexible(nn.Module):
    """One layer of grouped attention whose scores may get a learned table of relative positions."""

    def __init__(self, with_scores: bool) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.table = nn.Parameter(0.1 * torch.randn(4, 2 * S)) if with_scores else None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        mask = create_block_mask(causal_documents, None, None, x.shape[1], x.shape[1], device=x.device)
        table = self.table
        scored = None if table is None else lambda s, b, h, i, j: s + table[h, i - j + S - 1]
        return self.out(flex_attention(q, k, v, scored, mask, enable_gqa=True).transpose(1, 2).flatten(2)).square().mean()


def train(rank: int, P: int, with_scores: bool, strategy: str) -> list[float]:
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    flex._validate_device = lambda *_: None
    torch.manual_seed(0)
    model = Flexible(with_scores)
    oracle, x = copy.deepcopy(model), torch.randn(2, S, 32)
    compiled = torch.compile(model, backend="autoseq", options={"inner": "eager", "strategy": strategy, "strict": True})
    pairs = [(compiled(x), oracle(x))]
    for loss in pairs[0]:
        loss.backward()
    pairs += [(a.grad, e.grad) for a, e in zip(model.parameters(), oracle.parameters(), strict=True)]
    return [((a - e).norm() / e.norm()).item() for a, e in pairs]


@pytest.mark.parametrize(("with_scores", "strategy"), [(False, "ulysses"), (True, "ring"), (True, "gather_kv")])
def test_flex_attention_is_split_with_one_devices_numbers(with_scores: bool, strategy: str) -> None:
    for errors in run_ranks(train, 2, with_scores, strategy):
        assert max(errors) <= TOLERANCE, errors
