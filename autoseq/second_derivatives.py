"""A second derivative of a program that AOTAutograd has compiled is an error that names the inner that has one.

AOTAutograd compiles one backward, without a derivative of its own, and says so in its own words only when the second one runs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from autoseq.runtime.errors import UnsupportedError

_AOT = "CompiledFunctionBackward"
_VIEWS = 4  # AOTAutograd makes an output that is a view of another one anew: that many steps behind it stands the compiled function


def refuse_second_derivatives(results: Sequence[Any], inner: str) -> None:
    """Have the backward of compiled results hand out gradients whose own backward raises."""

    def refuse(gradients: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...] | None:
        if not torch.is_grad_enabled():
            return None
        # Torch 2.11 hands out gradients that need none, whose second derivatives would be missing without a word.
        return tuple(None if x is None else _Refusing.apply(x.detach().requires_grad_(), inner) for x in gradients)

    for node in {node for result in results if isinstance(result, Tensor) for node in _compiled(result.grad_fn)}:
        node.register_hook(refuse)


def _compiled(node: Any) -> Iterator[Any]:
    for _ in range(_VIEWS):
        if node is None:
            return
        if node.name() == _AOT:
            yield node
            return
        node = node.next_functions[0][0] if node.next_functions else None


class _Refusing(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, inner: str) -> Tensor:
        ctx.inner = inner
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            f"The gradient of a gradient was asked for (create_graph=True), and a program compiled with inner={ctx.inner!r} has none. "
            'Compile it with options={"inner": "eager"}.'
        )
