"""Joint attention over two concatenated sequences, text and image tokens: each keeps its own stream between the attentions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoseq.inspection import inspect_model
from autoseq.runtime.counting import counters, reset_counters
from ranks import run_ranks

TOLERANCE = 1e-5  # relative L2; float32 sums in another order


class Stream(nn.Module):
    """What one kind of token has for itself: a projection to q, k, v, one back, and a feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))

    def go_on(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class JointBlock(nn.Module):
    """One attention over both sequences, laid end to end in either order."""

    def __init__(self, width: int, heads: int, image_first: bool) -> None:
        super().__init__()
        self.text, self.image, self.image_first = Stream(width, heads), Stream(width, heads), image_first

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.text.project(text), self.image.project(image), strict=True)
        q, k, v = (torch.cat((i, t) if self.image_first else (t, i), 2) for t, i in pairs)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        sizes = [image.shape[1], text.shape[1]] if self.image_first else [text.shape[1], image.shape[1]]
        first, second = attended.split(sizes, 1) if self.image_first else (attended[:, : sizes[0]], attended[:, sizes[0] :])
        t, i = (second, first) if self.image_first else (first, second)
        return self.text.go_on(text, t), self.image.go_on(image, i)


class Joint(nn.Module):
    """Blocks of joint attention, and a loss of the image tokens."""

    def __init__(self, image_first: bool, blocks: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock(width, heads, image_first) for _ in range(blocks))
        self.head = nn.Linear(width, 6)

    def forward(self, text: Tensor, image: Tensor, wanted: Tensor) -> Tensor:
        for block in self.blocks:
            text, image = block(text, image)
        return F.mse_loss(self.head(image), wanted) + text.square().mean()


def make(image_first: bool, blocks: int = 2) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Joint(image_first, blocks), {"text": torch.randn(2, 11, 32), "image": torch.randn(2, 26, 32), "wanted": torch.randn(2, 26, 6)}


def train(rank: int, world_size: int, image_first: bool, strategy: str, inner: str = "eager", blocks: int = 2) -> list[float]:
    model, batch = make(image_first, blocks)
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
