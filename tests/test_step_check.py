"""Ranks that are given different things at any step hear of it before the optimizer steps, all of them; equal ranks pay 64 bytes for it."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from autoseq.given_differently import TOLERANCE_VARIABLE, tolerance_factor
from autoseq.given_inputs import EVERY_VARIABLE, check_every
from autoseq.runtime.counting import check_counters, reset_counters
from autoseq.runtime.errors import OptionError
from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.step_message import MESSAGE_BYTES, StepMessage
from autoseq.step_check import StepCheck
from autoseq.step_words import Head, fill_on_device, fill_on_host, fits
from ranks import RankError, run_ranks
from step_job import RIGHT, Tiny, Trainer, batch, compiled, loss_of, told

# Mistakes -------------------------------------------------------------------------------------------------------------


def one_label_less(rank: int) -> Tensor:
    labels = batch(1).clone()
    labels[1, 5] = (labels[1, 5] + rank) % 11
    return labels


def change_on_one(rank: int, trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model.head.weight.mul_(1.01) if rank else None
    trainer.inside(batch(1), batch(1))


def load_on_each(rank: int, trainer: Trainer) -> None:
    state = trainer.model.state_dict()
    trainer.model.load_state_dict({**state, "head.bias": state["head.bias"] + rank})
    trainer.inside(batch(1), batch(1))


def step_on_one(rank: int, trainer: Trainer) -> None:
    if rank == 1:
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        trainer.optimizer.step()
    trainer.inside(batch(1), batch(1))


def score_and_go_on(rank: int, trainer: Trainer) -> None:
    trainer.score(batch(1 + rank))
    trainer.score(batch(1))


def score_and_read(rank: int, trainer: Trainer) -> None:
    logits = trainer.score(batch(1 + rank))
    logits.argmax(-1)


def two_in_another_order(rank: int, trainer: Trainer) -> None:
    order = (1, 2) if rank == 0 else (2, 1)
    torch.stack([trainer.call(batch(i), batch(i))[0] for i in order]).sum().backward()


MISTAKES: dict[str, tuple[Callable[[int, Trainer], Any], str]] = {
    "other batches": (lambda r, t: t.inside(batch(1 + r), batch(1 + r)), "were given different values of ids"),
    "one label of a loss inside": (lambda r, t: t.inside(batch(1), one_label_less(r)), "were given different values of labels"),
    "one label of a loss outside": (
        lambda r, t: t.outside(batch(1), one_label_less(r)),
        "were given different values of the gradient that comes back into the output .*linear.*, by more than rounding",
    ),
    "a loss that is scaled differently": (
        lambda r, t: (t.call(batch(1), batch(1))[0] / (2 + r)).backward(),
        "were given different values of the gradient that comes back into output 0, by more than rounding",
    ),
    "weights that one rank changed": (change_on_one, r"had different values of the parameter or buffer head\.weight"),
    "weights that each rank loaded": (load_on_each, r"had different values of the parameter or buffer head\.bias"),
    "an optimizer that stepped on one rank": (step_on_one, r"had made different numbers of optimizer steps: \d+, \d+"),
    "two batches in another order": (two_in_another_order, "were given different values of ids"),
    "no gradients, heard of at the next call": (score_and_go_on, "were given different values of ids"),
    "no gradients, heard of when an output is read": (score_and_read, "were given different values of ids"),
}  # fmt: skip


def make_each_mistake(rank: int, P: int) -> dict[str, str]:
    trainer = Trainer()
    for _ in range(2):  # with and without labels are two programs; of each the first call compares inputs through the store
        trainer.inside(batch(1), batch(1))
        trainer.outside(batch(1), batch(1))
        trainer.score(batch(1))
    return trainer.try_each({name: lambda mistake=mistake: mistake(rank, trainer) for name, (mistake, _) in MISTAKES.items()})


def test_every_rank_hears_of_every_mistake() -> None:
    said = run_ranks(make_each_mistake, 2, timeout_s=60)
    for name, (_, what) in MISTAKES.items():
        for outcomes in said:
            expected = rf"RankMismatchError: At step \d+ ranks 0 and 1 of group '0' ({what})\. "
            assert re.match(expected, outcomes[name]), (name, outcomes[name])
            for way in ("In a plain loop: ", "DistributedSampler: ", "Trainer: autoseq.hf.attach", "accelerate: autoseq.hf.attach"):
                assert way in outcomes[name]


def differ_on_the_last(rank: int, P: int) -> str:
    trainer = Trainer()
    trainer.step(1)
    return told(lambda: trainer.inside(batch(1 + (rank == 2)), batch(1)))


def test_of_three_ranks_all_hear_which_one_differs() -> None:
    for said in run_ranks(differ_on_the_last, 3, timeout_s=60):
        assert said.startswith("RankMismatchError: At step 2 ranks 0 and 2 of group '0' were given different values of ids."), said


# What is no mistake ---------------------------------------------------------------------------------------------------


class Floats(nn.Module):
    """Attention of what is no number of a vocabulary, under a mask that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(x, x, x, attn_mask=mask)).square().mean()


def float_inputs(rank: int, P: int) -> dict[str, str]:
    torch.manual_seed(0)
    call, x = compiled(Floats()), torch.randn(1, 2, 8, 4)
    causal = torch.zeros(8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    other = causal.clone()
    other[2, 3] = 0.0
    cases = {
        "equal": (x, causal),
        "other rounding": (x * (1 + 1e-7 * rank), causal),
        "other values": (x * (1 + 1e-3 * rank), causal),
        "values in another order": (x.flip(2) if rank else x, causal),
        "another mask": (x, other if rank else causal),
    }
    return {name: told(lambda x=x, mask=mask: call(x, mask).backward()) for name, (x, mask) in cases.items()}


def test_floats_differ_by_rounding_alone() -> None:
    for said in run_ranks(float_inputs, 2, timeout_s=60):
        assert said["equal"] == said["other rounding"] == RIGHT
        for name in ("other values", "values in another order"):
            assert "different values of x, by more than rounding" in said[name] and TOLERANCE_VARIABLE in said[name]
        assert "different values of mask, by more than rounding" in said["another mask"]


def bfloat16_inputs(rank: int, P: int) -> dict[str, str]:
    torch.manual_seed(0)
    call, x, mask = compiled(Floats().bfloat16()), torch.randn(1, 2, 8, 4, dtype=torch.bfloat16), torch.zeros(8, 8, dtype=torch.bfloat16)
    one_bit = x.view(torch.int16).bitwise_xor(rank).view(torch.bfloat16)  # of each value, the last one
    cases = {"equal": x, "other rounding": torch.where(torch.arange(4) == 0, one_bit, x), "other values": x * (1 + 0.1 * rank)}
    return {name: told(lambda x=x: call(x, mask).backward()) for name, x in cases.items()}


def test_floats_of_16_bits_differ_by_their_own_rounding() -> None:
    for said in run_ranks(bfloat16_inputs, 2, timeout_s=60):
        assert said["equal"] == said["other rounding"] == RIGHT, said
        assert "different values of x, by more than rounding" in said["other values"]


def write_differently(rank: int, P: int) -> list[int]:
    """Equal weights that one rank wrote to: a comparison more, of which there are fewer and fewer."""
    trainer, messages = Trainer(), []
    trainer.step(1)
    for _ in range(8):
        with torch.no_grad():
            trainer.model.head.weight.mul_(1) if rank else None
        reset_counters()
        trainer.step(1)
        messages.append(check_counters()[0])
    return messages


def test_weights_that_are_equal_however_they_were_written_to_are_no_mistake() -> None:
    for messages in run_ranks(write_differently, 2, backend="autoseq_counted", timeout_s=60):
        assert messages == [2, 1, 1, 2, 1, 1, 1, 1]


# What it costs --------------------------------------------------------------------------------------------------------


def steps_of_many_kinds(rank: int, P: int) -> dict[str, tuple[int, int]]:
    """(messages, bytes) of each kind of step, in its third round: the first compiles, and the optimizer first steps there."""
    trainer = Trainer()
    kinds: dict[str, Callable[[], Any]] = {
        "loss inside": lambda: trainer.inside(batch(1), batch(1)),
        "loss outside": lambda: trainer.outside(batch(1), batch(1)),
        "two forwards, one backward": lambda: (trainer.call(batch(1), batch(1))[0] + trainer.call(batch(2), batch(2))[0]).backward(),
        "two forwards, one backward, outside": lambda: sum(loss_of(trainer.call(batch(i))[1], batch(i)) for i in (1, 2)).backward(),
        "accumulation": lambda: [trainer.inside(batch(i), batch(i)) for i in (1, 2)],
        "no gradients": lambda: trainer.score(batch(1)),
        "no gradients, read": lambda: trainer.score(batch(1)).argmax(-1),
        "a step with an optimizer": lambda: trainer.step(1),
        "checkpointed": lambda: checkpoint(trainer.call, batch(1), batch(1), use_reentrant=False)[0].backward(),
    }
    messages = {}
    for _ in range(3):
        for name, kind in kinds.items():
            reset_counters()
            kind()
            messages[name] = check_counters()
    assert told(lambda: trainer.inside(batch(1 + rank), batch(1))) != RIGHT
    return messages


@pytest.mark.parametrize("P", [2, 3])
def test_a_step_costs_one_message_of_64_bytes(P: int) -> None:
    for messages in run_ranks(steps_of_many_kinds, P, backend="autoseq_counted", timeout_s=60):
        for name, counted in messages.items():
            expected = 2 if name == "accumulation" else 1
            assert counted == (expected, expected * (P - 1) * MESSAGE_BYTES), name


def compare_weights_often(rank: int, P: int) -> tuple[list[int], str, int]:
    """Messages of each step when weights are compared every second one; and a change that torch does not count."""
    messages = []
    with mock.patch.dict(os.environ, {EVERY_VARIABLE: "2"}):
        trainer = Trainer()
        for number in range(6):
            reset_counters()
            trainer.step(number)
            messages.append(check_counters()[0])
        trainer.model.head.bias.data.add_(rank)
        heard = [told(lambda: trainer.inside(batch(1), batch(1))) for _ in range(2)]
    return messages, heard[1], heard.index(heard[1])


def test_weights_are_compared_every_so_many_steps() -> None:
    for messages, said, _ in run_ranks(compare_weights_often, 2, backend="autoseq_counted", timeout_s=60):
        # The optimizer's first step is a write of a new kind, and a comparison counts from then on.
        assert messages == [1, 2, 1, 2, 1, 2]
        assert "had different values of the parameter or buffer head.bias. It was changed on some of them only" in said


VARIABLES = [(EVERY_VARIABLE, check_every, "-1"), (TOLERANCE_VARIABLE, tolerance_factor, "none")]


@pytest.mark.parametrize(("variable", "read", "wrong"), VARIABLES)
def test_variables_are_numbers(variable: str, read: Callable[[], Any], wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, wrong)
    with pytest.raises(OptionError, match=f"{variable} must be a number.*got '{wrong}'"):
        read()


# Programs in parts, several groups, random numbers ---------------------------------------------------------------------


class InParts(nn.Module):
    """The loss stands behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Tiny()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.body(ids)[1]
        torch._dynamo.graph_break()
        return loss_of(logits * 2, labels)


def train_in_parts(rank: int, P: int) -> tuple[dict[str, int], dict[str, str]]:
    torch.manual_seed(0)
    call, messages = compiled(InParts()), {}

    def score(labels: Tensor) -> None:
        with torch.no_grad():
            call(batch(1), labels)

    for _ in range(2):
        for name, kind in {"train": lambda: call(batch(1), batch(1)).backward(), "score": lambda: score(batch(1))}.items():
            reset_counters()
            kind()
            messages[name] = check_counters()[0]
    said = {
        "train": told(lambda: call(batch(1), one_label_less(rank)).backward()),
        "score": told(lambda: [score(one_label_less(rank)) for _ in range(3)]),
    }
    return messages, said


def test_a_program_in_parts_is_compared_once_a_step_and_its_later_parts_too() -> None:
    for messages, said in run_ranks(train_in_parts, 2, backend="autoseq_counted", timeout_s=60):
        assert messages == {"train": 1, "score": 1}
        for each in said.values():
            assert "different values of labels" in each, said


def two_groups(rank: int, P: int) -> list[str]:
    """Each group has a batch of its own; then the ranks of one differ."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    data = mesh.get_local_rank("data")
    trainer = Trainer(mesh=mesh["sequence"])
    return [told(lambda i=i: trainer.inside(batch(i), batch(data))) for i in (data, data + 2, data + 4, rank if data else 9)]


def test_groups_have_batches_of_their_own() -> None:
    for rank, said in enumerate(run_ranks(two_groups, 4, timeout_s=60)):
        assert said[:3] == [RIGHT] * 3
        assert (said[3] == RIGHT) == (rank < 2), said
        assert rank < 2 or "At step 4 ranks 0 and 1 of group" in said[3]


def draw_on_one(rank: int, P: int) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    call = compiled(lambda x: model(F.scaled_dot_product_attention(x, x, x)).square().mean())
    x, said = torch.randn(1, 2, 8, 4), []
    for extra in (0, 0, 0, rank):
        torch.rand(extra)
        said.append(told(lambda: call(x).backward()))
    return said


def test_a_rank_whose_random_state_differs_is_told() -> None:
    for said in run_ranks(draw_on_one, 2, timeout_s=60):
        assert said[:3] == [RIGHT] * 3
        assert "made other calls, or were in other modes (gradients, random state) there" in said[3]


# The end --------------------------------------------------------------------------------------------------------------


def end_with_a_mistake(rank: int, P: int) -> None:
    trainer = Trainer()
    trainer.score(batch(1))
    trainer.score(batch(1 + rank))
    dist.destroy_process_group()


def test_the_last_step_is_compared_when_the_group_is_destroyed() -> None:
    with pytest.raises(RankError, match="At step 2 ranks 0 and 1 of group '0' were given different values of ids"):
        run_ranks(end_with_a_mistake, 2, timeout_s=60)


# On a device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_integers", "num_floats"), [(0, 1), (3, 1), (3, 2), (1, 4), (6, 4), (12, 0)])
def test_a_device_fills_the_message_as_the_host_does(num_integers: int, num_floats: int) -> None:
    """What a GPU has as tensors, on the CPU here, comes to the same bytes, also where tensors have to share a place."""
    hashes = [i * 0x123456789ABCDEF - (1 << 62) for i in range(num_integers)]
    sketches = [[1.5 * i, -0.25, 3.0 + i] for i in range(num_floats)]
    each_fits = fits(num_integers, num_floats)
    device, host = (StepMessage(SequenceGroup("g", 2, 0), torch.device("cpu")) for _ in range(2))
    head = Head(log=11, optimizer_steps=7, writes=5, due=3, is_new_habit=True)
    fill_on_device(device, head, [torch.tensor(hashes)] if hashes else [], [torch.tensor(each) for each in sketches], each_fits)
    fill_on_host(host, head, hashes, sketches, each_fits)
    assert torch.equal(host.words.view(torch.uint8), device.words.view(torch.uint8)), (host.floats, device.floats)
    assert Head.unpack(host.memory.tobytes()) == head


def test_a_step_without_fingerprints_of_a_device_has_its_message_there() -> None:
    """NCCL sends nothing from the host. The meta device stands for a GPU."""
    check = StepCheck(SequenceGroup("g", 2, 0), weakref.ref(Tiny()))
    check.note("a program of weights alone", torch.device("meta"))
    check.note("one of the host", torch.device("cpu"))
    assert check._message_for([]) is check._message_for([[1]])
    assert check._message_for([]).device.type == "meta"
