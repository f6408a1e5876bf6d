"""The float functions of a score's formula, by the names that the compiler writes and `runtime/formula.py` evaluates.

Each is the torch operator of the same meaning. A Python number beside a tensor is weak, as in torch: it is rounded to the tensor's
dtype and never changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def constant(numerator: int, denominator: int) -> float:
    """`const(n, d)`: the float n/d, exactly; (1, 0) is inf, (-1, 0) is -inf, (0, 0) is NaN."""
    if denominator == 0:
        return numerator * float("inf") if numerator else float("nan")
    return numerator / denominator


def _weak(value: Any) -> Tensor:
    # Without dims and on the CPU it is to torch what a number is: operators read it as a scalar, on any device.
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    return lambda x: function(_weak(x))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda x, y: function(_weak(x), _weak(y))


def _cast(dtype: torch.dtype) -> Callable[[Any], Tensor]:
    return lambda x: torch.as_tensor(x).to(dtype)


def _power(base: Any, exponent: Any) -> Tensor:
    # A number stays a number: torch squares for x**2, which a tensor of exponents would round differently.
    return torch.pow(_weak(base), exponent)


def _choose(condition: Any, a: Any, b: Any) -> Tensor:
    device = next((x.device for x in (condition, a, b) if isinstance(x, Tensor)), None)
    return torch.where(torch.as_tensor(condition, dtype=torch.bool, device=device), a, b)


FLOAT_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "f_add": _binary(torch.add),
    "f_sub": _binary(torch.sub),
    "f_mul": _binary(torch.mul),
    "f_div": _binary(torch.div),
    "f_neg": _unary(torch.neg),
    "f_abs": _unary(torch.abs),
    "f_exp": _unary(torch.exp),
    "f_exp2": _unary(torch.exp2),
    "f_log": _unary(torch.log),
    "f_log2": _unary(torch.log2),
    "f_sqrt": _unary(torch.sqrt),
    "f_rsqrt": _unary(torch.rsqrt),
    "f_tanh": _unary(torch.tanh),
    "f_sigmoid": _unary(torch.sigmoid),
    "f_sin": _unary(torch.sin),
    "f_cos": _unary(torch.cos),
    "f_relu": _unary(torch.relu),
    "f_pow": _power,
    "f_floor": _unary(torch.floor),
    "f_minimum": _binary(torch.minimum),
    "f_maximum": _binary(torch.maximum),
    "f_where": _choose,
    "f_eq": _binary(torch.eq),
    "f_ne": _binary(torch.ne),
    "f_lt": _binary(torch.lt),
    "f_le": _binary(torch.le),
    "f_gt": _binary(torch.gt),
    "f_ge": _binary(torch.ge),
    "to_float32": _cast(torch.float32),
    "to_float64": _cast(torch.float64),
    "to_float16": _cast(torch.float16),
    "to_bfloat16": _cast(torch.bfloat16),
    "to_int": _cast(torch.int64),
    "mask": _unary(lambda x: x),  # only says that what it holds may exclude keys by very large negative numbers
}
