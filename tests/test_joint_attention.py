"""Joint attention over two concatenated sequences, text and image tokens: each keeps its own stream between the attentions."""

import copy

import pytest
import torch
from torch import Tensor, nn

from autoseq.inspection import inspect_model
from autoseq.runtime.counting import counters, reset_counters
from joint_model import Joint
from ranks import run_ranks

TOLERANCE = 1e-5  # relative L2; float32 sums in another order


def make(image_first: bool, blocks: int = 2, words: int = 11) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Joint(image_first, blocks), {"text": torch.randn(2, words, 32), "image": torch.randn(2, 26, 32), "wanted": torch.randn(2, 26, 6)}


def train(
    rank: int, world_size: int, image_first: bool, strategy: str, inner: str = "eager", blocks: int = 2, words: int = 11
) -> list[float]:  # fmt: skip
    model, batch = make(image_first, blocks, words)
    oracle = copy.deepcopy(model)
    loss = torch.compile(model, backend="autoseq", options={"strategy": strategy, "inner": inner, "strict": True})(**batch)
    expected = oracle(**batch)
    loss.backward()
    expected.backward()
    pairs = [(loss.detach(), expected.detach()), *((p.grad, e.grad) for p, e in zip(model.parameters(), oracle.parameters(), strict=True))]
    return [((a - e).norm() / e.norm()).item() for a, e in pairs]


@pytest.mark.parametrize(
    ("image_first", "strategy", "world_size"),
    [
        pytest.param(False, "ulysses", 2, id="text first"),
        pytest.param(True, "ring", 3, id="image first, on three ranks"),
        pytest.param(False, "gather_kv", 3, id="text first, on three ranks"),
    ],
)
def test_both_streams_train_with_one_devices_numbers(image_first: bool, strategy: str, world_size: int) -> None:
    """Under `strict`: nothing is gathered."""
    assert max(max(errors) for errors in run_ranks(train, world_size, image_first, strategy)) <= TOLERANCE


def test_a_text_shorter_than_the_ranks() -> None:
    """Its own stream is whole on every rank; the joint attentions are split."""
    assert max(max(errors) for errors in run_ranks(train, 3, False, "ring", "eager", 2, 2)) <= TOLERANCE


@pytest.mark.slow
def test_every_rank_compiles_the_same_graph_though_each_sends_other_rows() -> None:
    """Inductor orders a graph's collectives by its own lights: the ranks would wait for each other if theirs differed.

    One block has every kind of exchange, from each stream's rows to both and back; Inductor is slow.
    """
    assert max(max(errors) for errors in run_ranks(train, 2, False, "ulysses", "inductor", 1)) <= TOLERANCE


def test_between_the_attentions_each_stream_is_split_as_a_sequence_of_its_own() -> None:
    found = inspect_model(lambda: make(False), seq_len=37, world_size=2, strategy="ulysses")
    assert [(planned.site.site.q_len, planned.site.site.k_len) for planned in found.sites] == [(37, 37)] * 2
    (program,) = found.programs
    rows = {node.meta["val"].shape[1] for node in program.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)}
    assert rows == {6, 13}  # of 11 text and 26 image tokens
    assert set(found.collectives) == {"all_to_all", "all_reduce"}
    counted = run_ranks(count_one_step, 2, backend="autoseq_counted")
    assert {op: (count.messages, count.bytes) for op, count in found.collectives.items()} == counted[0]


def count_one_step(rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """What this rank really sends in a training step."""
    model, batch = make(False)
    compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager", "strategy": "ulysses"})
    compiled(**batch).backward()
    reset_counters()
    compiled(**batch).backward()
    return counters()
