"""The comparison of a step does not depend on when a rank throws objects away, on other groups, or on who else reads an output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from autoseq.optimizer_steps import count, count_steps_of
from autoseq.random_state import drawing_devices
from autoseq.runtime.counting import check_counters, reset_counters
from ranks import run_ranks
from step_job import RIGHT, Tiny, Trainer, batch, compiled, loss_of, told


def assign(trainer: Trainer, number: int) -> None:
    """The same parameters as new objects, of which the first `number` weights are a little larger."""
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for name in [*state][-number or len(state) :]:
        state[name] *= 1.01
    trainer.model.load_state_dict(state, assign=True)


def parameters_anew_on_one(rank: int, P: int) -> tuple[list[tuple[str, int]], str]:
    trainer, heard = Trainer(), []
    for number in range(6):
        if number == 2 and rank == 1:
            assign(trainer, 0)
        reset_counters()
        heard.append((told(lambda: trainer.inside(batch(1), batch(1))), check_counters()[0]))
    if rank == 1:
        assign(trainer, 1)
    return heard, told(lambda: trainer.inside(batch(1), batch(1)))


def test_parameters_that_one_rank_has_as_new_objects_are_compared_by_all() -> None:
    for heard, said in run_ranks(parameters_anew_on_one, 2, backend="autoseq_counted", timeout_s=60):
        assert [what for what, _ in heard] == [RIGHT] * 6
        assert [messages for _, messages in heard][:4] == [1, 1, 2, 1]
        assert "had different values of the parameter or buffer head.bias" in said


def destroy_another_group(rank: int, P: int) -> list[str]:
    trainer, other = Trainer(), dist.new_group([0, 1])
    trainer.score(batch(1))
    trainer.score(batch(1 + rank))
    return [told(lambda: dist.destroy_process_group(other)), told(lambda: trainer.score(batch(1)))]


def test_the_end_of_another_group_is_not_the_end_of_this_one() -> None:
    for ended, said in run_ranks(destroy_another_group, 2, timeout_s=60):
        assert ended == RIGHT and "At step 2 ranks 0 and 1 of group '0' were given different values of ids" in said


class WrittenBetween(nn.Module):
    """An output of one part is written to before the next takes it in."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.added = Tiny(), 0.0

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.body(ids)[1]
        write(logits, self)
        return logits * 2


@torch._dynamo.disable
def write(logits: Tensor, model: Any) -> None:
    logits.add_(model.added)


def other_readers(rank: int, P: int) -> dict[str, list[str]]:
    torch.manual_seed(0)
    trainer, between = Trainer(), WrittenBetween()
    loss, call = torch.compile(loss_of, backend="aot_eager"), compiled(between)
    said: dict[str, list[str]] = {"compiled loss": [], "written": []}
    for mistake in (0, 0, rank):
        labels = batch(1).clone()
        labels[0, 0] = (labels[0, 0] + mistake) % 11
        said["compiled loss"].append(told(lambda labels=labels: loss(trainer.call(batch(1))[1], labels).backward()))
        between.added = float(mistake)
        said["written"].append(told(lambda: call(batch(1)).sum().backward()))
    return said


def test_an_output_that_another_compiler_reads_or_a_write_changes_is_compared() -> None:
    for said in run_ranks(other_readers, 2, timeout_s=120):
        for name, what in {"compiled loss": "the gradient that comes back into the output ", "written": ""}.items():
            assert said[name][:2] == [RIGHT] * 2 and f"were given different values of {what}" in said[name][2], (name, said[name])


class Outer(torch.optim.SGD):
    """Steps by an optimizer of a part of its parameters, as ZeroRedundancyOptimizer does."""

    def step(self, closure: Any = None) -> None:
        torch.optim.SGD(self.param_groups[0]["params"], lr=0.1).step(closure)


def failing() -> float:
    raise ValueError("the loss is not finite")


def test_a_step_within_a_step_is_not_counted() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    count_steps_of(parameters)
    outer, plain, before = Outer(parameters), torch.optim.SGD(parameters), count()
    outer.step()
    assert count() == before + 1
    for optimizer in (outer, plain):
        try:
            optimizer.step(failing)
        except ValueError:
            continue
        raise AssertionError("the step did not fail")
    plain.step()
    assert count() == before + 2


def test_a_program_draws_on_the_devices_of_what_it_draws() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.rand_like.default, (graph.placeholder("x"),))
    node.meta["val"] = torch.empty(2, device="meta")
    program: Any = SimpleNamespace(is_untraced=False, before=graph, inputs=[torch.ones(1)])
    assert drawing_devices(program) == {torch.device("meta")}
    program.is_untraced = True
    assert drawing_devices(program) == {torch.device("cpu")}
