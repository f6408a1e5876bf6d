"""One node that moves rows along the sequence: what `shard` emits where both sides are sharded, each as a sequence of its own.

    cat([text, image], 1)     →     arrange_rows([text, image], pieces=[(0, 0, 0, 77), (1, 0, 77, 4096)], …)

Parts that are whole on every rank give the rows that a rank needs; sharded ones exchange them.
"""

from torch import fx

from autoseq.passes.factors import MARK, Mark, operand_at, tensor_operands
from autoseq.passes.placements import Placements
from autoseq.passes.rules.moves import Move, moves_of
from autoseq.passes.rules.rule import result_nodes
from autoseq.runtime import moves as runtime_moves
from autoseq.runtime.layout import local_length


def moved_results(placements: Placements, node: fx.Node) -> list[tuple[fx.Node, fx.Node, Mark]] | None:
    """Each result of a node as (result, its local node, its mark), or None if the node is no move from shards to shards."""
    moves = moves_of(node)
    results = result_nodes(node)
    if moves is None or not results or not all(
        MARK in result.meta and result.meta[MARK].is_all_of(moves[i].dim) for i, result in results.items()
    ):
        return None
    operands = [operand_at(node, path) for path in tensor_operands(node)]
    if not any(x is not None and _shard(placements, x, moves[0].dim) is not None for x in operands):
        return None
    return [(result, _emit(placements, node, moves[i], result), result.meta[MARK]) for i, result in results.items()]


def _shard(placements: Placements, x: fx.Node, dim: int) -> tuple[int, int] | None:
    """The (length, local rows) of an operand that is sharded along `dim`."""
    mark = placements.mark_of(x)
    if mark is None or not mark.is_all_of(dim):
        return None
    return int(x.meta["val"].shape[dim]), int(local_length(mark.base, placements.P, placements.layout))


def _emit(placements: Placements, node: fx.Node, move: Move, result: fx.Node) -> fx.Node:
    operands = [x for path in tensor_operands(node) if (x := operand_at(node, path)) is not None]
    shards = [_shard(placements, x, move.dim) for x in operands]
    parts = [placements.varied(x) if shard is None else placements.plain(x) for x, shard in zip(operands, shards, strict=True)]
    keywords = placements.sharding(result.meta["val"], result.meta[MARK])
    made = placements.graph.call_function(
        runtime_moves.arrange_rows, (parts,), {"pieces": move.pieces, "shards": shards, "fill": move.fill, **keywords})
    made.meta.update({k: v for k, v in result.meta.items() if k not in ("val", "tensor_meta", MARK)})
    return made
