"""Find the sequence: which dim of which tensor it is, from the attentions outwards, with no tagging of inputs.

    q [B, H, S, D] at an attention   →   linear's result [B, S, E]   →   embedding's [B, S, E]   →   input_ids [B, S]

An attention's q, k, v and result hold the sequence in dim 2. A factor shared by an operator's operands and results carries
the mark both ways, until an operator needs it whole or has no rule. The marks are wishes (`node.meta["sequence"]`): `shard`
decides, node by node, and gathers where a wish cannot be met. The graph itself is not changed.
"""

import operator
from collections import deque

import torch
from torch import fx

from autoseq.passes.attention_site import is_attention
from autoseq.passes.factors import MARK, Factors, Mark, Size, fits, locate, operand_at, place_in, tensor_operands
from autoseq.passes.rules import linear_algebra, rule_for
from autoseq.passes.rules.moves import keeps_most, moves_of
from autoseq.passes.rules.rule import result_nodes
from autoseq.passes.sizes import same_size

aten = torch.ops.aten


def find_sequence(gm: fx.GraphModule) -> int:
    """Mark every tensor that the sequence reaches; returns how many were marked."""
    queue: deque[fx.Node] = deque()
    reached: deque[fx.Node] = deque()
    for site in gm.graph.nodes:
        if is_attention(site):
            for node, base in _seeds(site):
                _mark(node, Mark(2, 1, 1, base), queue)
    # Rows that move may make a sequence of their own, so what shared factors reach is marked first: in cross_entropy(logits, pad(ids)[1:])
    # the logits have the rows of the attention, not those of the padded ids.
    while queue or reached:
        if queue:
            node, carry = queue.popleft(), carry_shared
            reached.append(node)
        else:
            node, carry = reached.popleft(), carry_moved
        producer = node.args[0] if node.target is operator.getitem else node
        for neighbour in (producer, *node.users):
            carry(neighbour, queue)
    return sum(MARK in node.meta for node in gm.graph.nodes)


def _seeds(site: fx.Node) -> list[tuple[fx.Node, Size]]:
    """An attention's query side and key side; two spaces when their lengths differ."""
    q, k, v = site.args[:3]
    q_len, k_len = q.meta["val"].shape[2], k.meta["val"].shape[2]  # type: ignore[union-attr]
    if same_size(q_len, k_len):
        k_len = q_len
    return [(site, q_len), (q, q_len), (k, k_len), (v, k_len)]  # type: ignore[list-item]


def _mark(node: fx.Node, mark: Mark | None, queue: deque[fx.Node]) -> None:
    if mark is None or MARK in node.meta:
        return
    node.meta[MARK] = mark
    queue.append(node)


def carry_shared(node: fx.Node, queue: deque[fx.Node]) -> None:
    """Carry marks across one node, between its operands and results."""
    factors = factors_of(node)
    if factors is None:
        return
    tensors = node_tensors(node)
    sides = list(zip(tensors, (*factors.operands, *factors.results), strict=True))
    for tensor, dims in sides:
        if tensor is None or dims is None or MARK not in tensor.meta:
            continue
        place = locate(dims, factors.sizes, tensor.meta[MARK])
        if place is None or not factors.admits(place):
            continue
        for other, other_dims in sides:
            if other is not None and other_dims is not None:
                found = place_in(other_dims, factors.sizes, place)
                if found is not None and fits(other.meta["val"].shape, found):
                    _mark(other, found, queue)


# Rows that move -------------------------------------------------------------------------------------------------------

_FEW = 8  # a shorter sequence is not worth sharing out


def carry_moved(node: fx.Node, queue: deque[fx.Node]) -> None:
    """Sequences that are laid end to end, or cut out of one, are sequences of their own: text beside image tokens.

    From an operand to each result; from a result back to the operands only where it spares work, since rows of a value that is
    whole on every rank are there already.
    """
    moves = moves_of(node) if node.op == "call_function" else None
    if moves is None:
        return
    operands = [operand_at(node, path) for path in tensor_operands(node)]
    for index, result in result_nodes(node).items():
        dim = moves[index].dim
        parts = [operands[number] for number, *_ in moves[index].pieces]
        if _along(result, dim):
            for part in parts:
                if part is not None and len(moves) == 1 and node.target is not aten.slice.Tensor:
                    mark = _own_space(part, dim, result)
                    _mark(part, mark if mark is not None and _takes_work(part, mark) else None, queue)
        else:
            known = next((part for part in parts if part is not None and _along(part, dim)), None)
            _mark(result, None if known is None else _own_space(result, dim, known), queue)


def _along(node: fx.Node, dim: int) -> bool:
    mark = node.meta.get(MARK)
    return mark is not None and mark.is_all_of(dim)


def _own_space(node: fx.Node, dim: int, other: fx.Node) -> Mark | None:
    """The mark of a tensor whose rows come from or go to `other`: in the same space if it has most of its rows, else one of its own."""
    length, base = int(node.meta["val"].shape[dim]), int(other.meta[MARK].base)
    if length <= _FEW:
        return None
    return Mark(dim, 1, 1, base if length <= base and keeps_most(length, base) else length)


def _takes_work(node: fx.Node, mark: Mark) -> bool:
    """Whether a product of matrices, or an attention, has worked on these rows: the marks' way up, for one look."""
    ahead, seen = [(node, mark)], set()
    while ahead:
        x, here = ahead.pop()
        if is_attention(x) or x.target in linear_algebra.PRODUCTS:
            return True
        factors = factors_of(x.args[0] if x.target is operator.getitem else x)  # type: ignore[arg-type]
        if x in seen or factors is None:
            continue
        seen.add(x)
        tensors = node_tensors(x.args[0] if x.target is operator.getitem else x)  # type: ignore[arg-type]
        sides = list(zip(tensors, (*factors.operands, *factors.results), strict=True))
        place = next((locate(dims, factors.sizes, here) for tensor, dims in sides if tensor is x and dims is not None), None)
        if place is None or not factors.admits(place):
            continue
        for tensor, dims in sides[: len(factors.operands)]:
            found = None if tensor is None or dims is None else place_in(dims, factors.sizes, place)
            if tensor is not None and found is not None:
                ahead.append((tensor, found))
    return False


# A node's factors and tensors -----------------------------------------------------------------------------------------


def factors_of(node: fx.Node) -> Factors | None:
    """The factors of a node with a rule; None for everything else."""
    if node.op != "call_function":
        return None
    rule = rule_for(node)
    return rule.factors(node) if rule else None


def node_tensors(node: fx.Node) -> list[fx.Node | None]:
    """A node's tensor operands, then its results: itself, or the `getitem`s of a tuple."""
    operands = [operand_at(node, path) for path in tensor_operands(node)]
    val = node.meta["val"]
    if not isinstance(val, (list, tuple)):
        return [*operands, node]
    items = {user.args[1]: user for user in node.users}
    return [*operands, *(items.get(i) for i in range(len(val)))]
