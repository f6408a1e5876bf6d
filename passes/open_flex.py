"""Open `flex_attention`: its two small programs become a mask and a score function between plain matrix products.

    flex_attention(q, k, v, score_mod, (…, mask_mod), scale)[0]
        →  sdpa(q, k, v, attn_mask=mask_mod(b, h, i, j), scale=scale)                                # without a score_mod
        →  matmul(_safe_softmax(where(mask_mod(…), score_mod(q·kᵀ · scale, b, h, i, j), -inf)), v)   # with one

Part of `open_regions`, on Dynamo's graph. Legal because this is the operator's own definition (`math_attention` in torch): rows
without a key give 0, scores are at least float32, autocast reaches q, k and v only. The S×S tensors stand in the graph until
later passes have read them as formulas; what cannot be read is computed so, exactly.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention.flex_attention import _vmap_for_bhqkv

from autoseq.passes.autocast import ENTER, EXIT, autocast_dtype
from autoseq.passes.flex_blocks import Blocks, allowed
from autoseq.passes.inline import carry, casting, example, example_mode, inline_call, replace_items
from autoseq.passes.sizes import same_size

aten = torch.ops.aten


def open_flex(gm: fx.GraphModule, call: fx.Node, values: Mapping[fx.Node, Any]) -> None:
    """Replace one `flex_attention` higher-order call of Dynamo's graph by what it computes; `values` are those of the inputs."""
    _Opening(gm, call, values).run()


class _Opening:
    """One call being opened; every node it makes carries the call's metadata."""

    def __init__(self, gm: fx.GraphModule, call: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        self.gm, self.call, self.values = gm, call, values
        arguments: Any = call.args
        self.q, self.k, self.v, score_mod, self.block_mask, self.scale, _, *buffers = arguments
        self.score_buffers, self.mask_buffers = (*buffers, (), ())[:2]
        self.score_mod, self.mask_mod = (_program(gm, ref) for ref in (score_mod, self.block_mask[-1]))

    def run(self) -> None:
        dtype = autocast_dtype(self.call, example(self.q).device.type)
        if dtype is not None and example(self.q).dtype != torch.float64:
            self.q, self.k, self.v = (self.emit(aten._to_copy.default, x, dtype=dtype) for x in (self.q, self.k, self.v))
        batch = example(self.q).shape[0]
        if not same_size(example(self.k).shape[0], batch):  # one batch of keys for all
            self.k, self.v = (self.emit(Tensor.expand, x, self.size(self.q, 0), -1, -1, -1) for x in (self.k, self.v))
        self.indices = self.positions()
        mask = self.mask()
        used = {int(user.args[1]) for user in self.call.users if user.users}  # pyright: ignore[reportArgumentType]
        if self.score_mod_is_identity() and used <= {0}:
            results = [self.attend(mask)]
        else:
            results = self.without_autocast(mask, used) if dtype is not None else self.written_out(mask, used)
        replace_items(self.call, [*results, None, None][:3])

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = carry(self.call, self.gm.graph.call_function(target, args, kwargs))
        with example_mode([self.q]), casting([self.q], None):
            node.meta["example_value"] = target(*fx.map_arg(args, example), **fx.map_arg(kwargs, example))
        return node

    def size(self, x: Any, dim: int) -> Any:
        return size if isinstance(size := example(x).shape[dim], int) else self.emit(aten.sym_size.int, x, dim)

    def positions(self) -> list[fx.Node]:
        """b, h, i and j, each from 0."""
        sizes = [self.size(self.q, 0), self.size(self.q, 1), self.size(self.q, 2), self.size(self.k, 2)]
        return [self.emit(torch.arange, size, device=example(self.q).device) for size in sizes]

    # The two programs -------------------------------------------------------------------------------------------------

    def score_mod_is_identity(self) -> bool:
        graph = self.score_mod.graph
        return graph.output_node().args[0] is graph.find_nodes(op="placeholder")[0]

    def mask(self) -> fx.Node | None:
        """[B, H, Sq, Sk], true where a query may see a key; None where it always may."""
        mask = None
        vectorized = _vmap_for_bhqkv(_with_lookups(self.mask_mod), (), (None,) * len(self.mask_buffers))
        if not _always_true(self.mask_mod):
            mask = inline_call(self.gm, self.call, vectorized, [*self.indices, *self.mask_buffers])
        blocks, lengths = Blocks.of(self.block_mask), (example(self.q).shape[2], example(self.k).shape[2])
        if blocks.say_nothing(self.values, self.mask_buffers, vectorized, lengths):
            return mask
        return inline_call(self.gm, self.call, allowed, [*self.indices[2:], mask, *blocks.sizes, *blocks.operands])

    def modified(self, scores: fx.Node) -> fx.Node:
        if self.score_mod_is_identity():
            return scores
        vectorized = _vmap_for_bhqkv(_with_lookups(self.score_mod), (0,), (None,) * len(self.score_buffers))
        return inline_call(self.gm, self.call, vectorized, [scores, *self.indices, *self.score_buffers])

    # The attention ----------------------------------------------------------------------------------------------------

    def attend(self, mask: fx.Node | None) -> fx.Node:
        grouped = not same_size(example(self.q).shape[1], example(self.k).shape[1])
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return self.emit(sdpa, self.q, self.k, self.v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)

    def written_out(self, mask: fx.Node | None, used: set[int]) -> list[fx.Node | None]:
        """Output, and where the program uses them log-sum-exp and maximum, both over log 2 as the operator gives them."""
        dtype = example(self.q).dtype
        working = torch.float64 if dtype == torch.float64 else torch.float32
        groups = int(example(self.q).shape[1] // example(self.k).shape[1])
        k, v = self.k, self.v
        if groups != 1:
            k, v = (self.emit(torch.repeat_interleave, x, groups, dim=1) for x in (k, v))
        q, k = (x if dtype == working else self.emit(aten._to_copy.default, x, dtype=working) for x in (self.q, k))
        products = self.emit(torch.matmul, q, self.emit(torch.transpose, k, -2, -1))
        scores = self.modified(self.emit(torch.mul, products, self.scale))
        if mask is not None:
            scores = self.emit(torch.where, mask, scores, -math.inf)
        weights = self.emit(torch._safe_softmax, scores, -1)
        if example(weights).dtype != dtype:
            weights = self.emit(aten._to_copy.default, weights, dtype=dtype)
        lse = self.emit(torch.div, self.emit(torch.logsumexp, scores, -1), math.log(2)) if 1 in used else None
        top = self.emit(torch.div, self.emit(torch.amax, scores, -1), math.log(2)) if 2 in used else None
        return [self.emit(torch.matmul, weights, v), lse, top]

    def without_autocast(self, mask: fx.Node | None, used: set[int]) -> list[fx.Node | None]:
        device = example(self.q).device.type
        graph = self.gm.graph
        region = carry(self.call, graph.call_function(ENTER, (device, None, False, None)))
        results = self.written_out(mask, used)
        carry(self.call, graph.call_function(EXIT, (region,)))
        return results


def _program(gm: fx.GraphModule, reference: fx.Node) -> fx.GraphModule:
    program = gm.get_submodule(str(reference.target))
    assert isinstance(program, fx.GraphModule)
    return program


def _always_true(mask_mod: fx.GraphModule) -> bool:
    """Whether a mask_mod is torch's `noop_mask`."""
    result = mask_mod.graph.output_node().args[0]
    return isinstance(result, fx.Node) and result.op == "call_method" and result.target == "new_ones"


def _with_lookups(mod: fx.GraphModule) -> Any:
    """`mod`, with `table[i]` for a scalar tensor `i` being a lookup and not a view, which vmap could not batch."""

    def fn(*args: Any) -> Any:
        with _Lookups():
            return fx.Interpreter(mod).run(*args)

    return fn


class _Lookups(torch.overrides.TorchFunctionMode):
    """What torch's own `TransformGetItemToIndex` does, without its autograd function and its tensor constants."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.__getitem__:
            table, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
            tensors = [i for i in index if isinstance(i, torch.Tensor)]
            if tensors and all(isinstance(i, (torch.Tensor, int)) for i in index):
                whole = [i if isinstance(i, torch.Tensor) else torch.full((), i, device=table.device) for i in index]
                return aten.index.Tensor(table, whole)
        return func(*args, **(kwargs or {}))
