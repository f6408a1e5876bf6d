"""Find the sequence: which dim of which tensor it is, from the attentions outwards, with no tagging of inputs.

    q [B, H, S, D] at an attention   →   linear's result [B, S, E]   →   embedding's [B, S, E]   →   input_ids [B, S]

An attention's q, k, v and result hold the sequence in dim 2. A factor shared by an operator's operands and results carries
the mark both ways, until an operator needs it whole or has no rule. The marks are wishes (`node.meta["sequence"]`): `shard`
decides, node by node, and gathers where a wish cannot be met. The graph itself is not changed.
"""

import operator
from collections import deque

from torch import fx

from autoseq.passes.factors import MARK, Factors, Mark, Size, fits, locate, operand_at, place_in, tensor_operands
from autoseq.passes.find_attention import is_attention
from autoseq.passes.rules import rule_for
from autoseq.passes.sizes import same_size


def find_sequence(gm: fx.GraphModule) -> int:
    """Mark every tensor that the sequence reaches; returns how many were marked."""
    queue: deque[fx.Node] = deque()
    for site in gm.graph.nodes:
        if is_attention(site):
            for node, base in _seeds(site):
                _mark(node, Mark(2, 1, 1, base), queue)
    while queue:
        node = queue.popleft()
        producer = node.args[0] if node.target is operator.getitem else node
        for neighbour in (producer, *node.users):
            _carry(neighbour, queue)
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


def _carry(node: fx.Node, queue: deque[fx.Node]) -> None:
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
