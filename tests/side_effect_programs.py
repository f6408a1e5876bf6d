"""Programs that do more than compute: in-place writes, hidden from autograd or not, hooks, strided views of memory.

Each takes a model and an input that needs a gradient. `test_side_effects` holds them to one device.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

W = 8


class Written(nn.Module):
    """An attention, two projections, a scale and a running mean."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.qkv, self.f, self.g = nn.Linear(W, 3 * W), nn.Linear(W, W), nn.Linear(W, W)
        self.scale, self.words, self.drop = nn.Parameter(torch.randn(W)), nn.Embedding(16, W, max_norm=1.0), nn.Dropout(0.3)
        self.register_buffer("mean", torch.randn(W))
        self.register_buffer("steps", torch.zeros(()))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Any:
        return PROGRAMS[self.name](self, x)


Program = Callable[[Any, Tensor], Any]
PROGRAMS: dict[str, Program] = {}


def added_to(programs: dict[str, Program]) -> Callable[[Program], Program]:
    """A decorator for programs, by the words of their names."""

    def program(fn: Program) -> Program:
        programs[fn.__name__.replace("_", " ")] = fn
        return fn

    return program


program = added_to(PROGRAMS)


@program
def a_parameter_through_data(m: Any, x: Tensor) -> Any:
    m.f.weight.data.clamp_(-0.1, 0.1)
    return m.f(m.attend(x))


@program
def a_parameter_under_no_grad(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        m.f.weight.clamp_(-0.1, 0.1)
    return m.f(m.attend(x))


@program
def slices_of_a_parameter(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        m.f.weight[2:4].copy_(m.g.weight[:2])
        m.scale.index_put_((torch.tensor([1, 3]),), torch.tensor([0.5, 0.25]))
    m.scale.data[5:].zero_()
    return m.f(m.attend(x)) * m.scale


@program
def what_the_write_returns_is_used(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        scale = m.scale.clamp_(-0.2, 0.2)
    return m.f(m.attend(x)) * scale, m.scale


@program
def an_embedding_with_max_norm(m: Any, x: Tensor) -> Any:
    ids = torch.arange(x.shape[1], device=x.device) % 16
    return m.f(m.attend(x + m.words(ids)))


@program
def an_activation_under_no_grad(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    with torch.no_grad():
        y.mul_(2)
        y.add_(1)
    z = y * 1
    with torch.no_grad():
        y.mul_(0.5)
    return z + y + x


@program
def an_activation_through_data_and_detach(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    y.data.clamp_(-0.3, 0.3)
    y.detach().mul_(2)
    return x + y


@program
def a_write_to_a_view(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    view = y[:, :, 2:5]
    with torch.no_grad():
        view.mul_(3)
        y[:, 3:5] = 0.5
    return y + 1


@program
def a_write_to_a_base(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    view, rows = y[:, :, 2:5], y[:, 1:4].detach()
    with torch.no_grad():
        y.mul_(3)
    return view + 1, rows


@program
def detached_views_of_one_tensor(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    part = y[:, 1:, :3].detach()
    part.add_(1)
    whole = y.detach()
    whole.mul_(m.scale)
    return y * 1 + part.sum() + whole


@program
def hidden_and_seen_writes_in_turn(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    view = y[:, 1:]
    with torch.no_grad():
        y.mul_(2)
    y.mul_(3)
    y.data.add_(1)
    y.add_(x)
    with torch.no_grad():
        view.add_(1)
        seen = y[:, :2] * 2
    return y[:, :2] + view[:, :2] + seen


@program
def gradients_on_and_off_in_turn(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    with torch.no_grad():
        y.mul_(2)
        with torch.enable_grad():
            z = y * 3
            y.add_(1)
        torch.mul(y, 0.5, out=y)
    return y + z


@program
def a_running_mean_and_a_parameter(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    with torch.no_grad():
        m.mean.mul_(0.9).add_(0.1 * y.mean((0, 1)))
        m.steps += 1
        m.scale.clamp_(-0.2, 0.2)
    m.mean.lerp_(y.detach().amax((0, 1)), 0.1)
    return y * m.mean + m.scale


@program
def an_input(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        x.mul_(2)
    x.add_(1)
    return m.f(m.attend(x))


@program
def dropout_without_effect(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    dropped = F.dropout(y, 0.3, training=False)
    dropped += x
    again = F.dropout(dropped, 0.0)
    again *= 2
    return m.g(y) + dropped


@program
def dropout_that_drops_all(m: Any, x: Tensor) -> Any:
    dropped = F.dropout(m.f(m.attend(x)), 1.0)
    dropped += x
    return m.g(dropped)


@program
def dropout_in_place(m: Any, x: Tensor) -> Any:
    kept = m.f(m.attend(x)) + torch.dropout(x, p=0.1, train=False)
    dropped = F.dropout(kept, 1.0, True, inplace=True)
    dropped += x
    return m.g(kept + dropped)


@program
def a_checkpointed_region(m: Any, x: Tensor) -> Any:
    def body(x: Tensor) -> Tensor:
        y = m.f(x)
        with torch.no_grad():
            y.mul_(2)
        return torch.tanh(y)

    return checkpoint(body, m.attend(x), use_reentrant=False)


@program
def data_that_is_replaced(m: Any, x: Tensor) -> Any:
    before = m.scale.detach()
    new = m.scale * 0.5
    m.scale.data = new
    shared = new.detach()
    with torch.no_grad():
        m.scale.mul_(2)
    y = m.f(m.attend(x)) * m.scale
    m.mean.data = m.mean.data * 0.9 + y.mean((0, 1)).data
    return y * m.mean + shared + before


@program
def data_written_before_its_use_and_beside_it(m: Any, x: Tensor) -> Any:
    m.f.weight.data.mul_(0.5)
    y = m.f(m.attend(x))
    z = y + 1
    y.data.mul_(2)
    m.g.weight.data[2:] = 0.3
    return z + m.g(y)


@program
def a_hook_on_an_activation(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    y.register_hook(lambda grad: grad * 2)
    return y * y


@program
def two_hooks_behind_a_reader(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    before = y * 3
    y.register_hook(lambda grad: grad * 2 + 1)
    y.register_hook(lambda grad: grad * grad)
    return y * y + before


@program
def a_hook_that_reads_all_rows_and_a_buffer(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    scale = m.mean.exp()
    y.register_hook(lambda grad: grad / grad.norm() * scale)
    return m.g(y)


@program
def hooks_between_writes(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x)) * 1
    y.register_hook(lambda grad: grad * 2)
    y.mul_(3)
    y.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    with torch.no_grad():
        y.mul_(2)
    return y + 1


@program
def hooks_on_views_and_on_what_nothing_reads(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x)) * 1
    view, read = y[:, 1:4], y * 2
    view.register_hook(lambda grad: grad * 2)
    y.register_hook(lambda grad: None)
    read.register_hook(lambda grad: grad * 3)
    return read.sum() + view * view


@program
def a_hook_on_a_parameter(m: Any, x: Tensor) -> Any:
    m.scale.register_hook(lambda grad: grad * 2)
    return m.f(m.attend(x)) * m.scale


@program
def overlapping_windows(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    B, S, D = y.shape
    return y.as_strided((B, S - 2, 3, D), (S * D, D, D, 1)).sum(2)


@program
def memory_of_a_transposed_tensor(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x)).transpose(1, 2)
    B, D, S = y.shape
    return torch.as_strided(y, (B, S, D), (S * D, D, 1)).cumsum(1)


@program
def memory_of_an_attention(m: Any, x: Tensor) -> Any:
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    B, H, S, D = y.shape
    return y.as_strided((B, 2, 3), (H * S * D, 5, 1), 1) * 2, y.as_strided(y.shape, y.stride()) * 3


@program
def writes_to_a_strided_view_and_its_base(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    B, S, D = y.shape
    columns = y.as_strided((B, S, 2), (S * D, D, 3), 1)
    y.mul_(2)
    with torch.no_grad():
        columns.add_(1)
    detached = y.detach()
    columns.mul_(m.scale[:2])
    detached.as_strided((B, 2), (S * D, 1)).zero_()
    return y * 1, columns * 1, detached


@program
def a_branch_on_contiguity(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x)).transpose(1, 2)
    return y.reshape(len(y), -1).cumsum(1) if not y.is_contiguous() else y * 0


@program
def what_changes_nothing_under_no_grad(m: Any, x: Tensor) -> Any:
    y = m.attend(x)
    found = []
    with torch.no_grad():
        found += [y[:, 0:], torch.cat([y[:, :0], y], 1), y.view(y.shape), y.expand(y.shape), y.contiguous(), y.to(y.dtype)]
    return sum(m.f(each) * weight for weight, each in enumerate(found)), y
