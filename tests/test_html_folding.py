"""Which blocks are drawn once: those that repeat and differ in nothing but numbers in their names."""

import pytest

from autoseq.html_blocks import Block, Fold, Item, Line, Parameter, Product, Row, Value
from autoseq.html_costs import fold_title, totals
from autoseq.html_folding import fold


def line(op: str = "linear", source: str = "model.py:3", parameter: str = "") -> Line:
    value = Value("f32[1, 8]", 32)
    held = (Parameter(parameter, value, True),) if parameter else ()
    return Line(op, f"{op}(x)", f"{op}(·)", source, value, value, "Shard(1)", Product((1, 8), 4), Product((1, 2), 4), held)


def layer(number: int, op: str = "linear", kind: str = "Layer", parameter: bool = True) -> Block:
    name = f"layers.{number}"
    return Block(name, name, kind, (Row("compute", (line(op, parameter=f"{name}.weight" if parameter else ""),)),))


def shown(items: tuple[Item, ...]) -> str:
    """`L0 3×(L1)`: labels, and folds with what stands for them."""
    def one(item: Item) -> str:
        if isinstance(item, Fold):
            return f"{item.times}×({shown(item.items)})"
        return item.label.replace("layers.", "L") if isinstance(item, Block) else item.lines[0].op

    return " ".join(map(one, items))


ROW = Row("compute", (line("add"),))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        pytest.param([], "", id="nothing"),
        pytest.param([layer(0)], "L0", id="one layer stays"),
        pytest.param([layer(i) for i in range(4)], "4×(L0)", id="equal layers"),
        pytest.param([ROW, layer(0), layer(1), ROW], "add 2×(L0) add", id="between other steps"),
        pytest.param([layer(0), ROW, layer(1)], "L0 add L1", id="not neighbours"),
        pytest.param([ROW, ROW], "add add", id="steps alone do not fold"),
        pytest.param([layer(0, "mul"), *(layer(i) for i in range(1, 4))], "L0 3×(L1)", id="the first differs"),
        pytest.param([layer(0), layer(1, kind="Other")], "L0 L1", id="of other classes"),
        pytest.param([layer(i, "ab"[i % 2]) for i in range(6)], "3×(L0 L1)", id="alternating"),
        pytest.param([layer(i, "ab"[i % 3 == 2]) for i in range(6)], "2×(2×(L0) L2)", id="a period that repeats itself inside"),
        pytest.param([layer(i, "ab"[i % 3 == 2]) for i in range(7)], "2×(2×(L0) L2) L6", id="with a rest"),
    ],
)
def test_what_folds(items: list[Item], expected: str) -> None:
    assert shown(fold(items)) == expected


def test_layers_inside_a_block_fold_and_so_do_blocks_with_folds() -> None:
    stages = [Block(f"stage{i}", f"stage{i}", "Stage", (layer(0), layer(1))) for i in range(3)]
    (folded,) = fold(stages)
    assert isinstance(folded, Fold)
    assert (folded.times, folded.paths, folded.kinds) == (3, ("stage0", "stage1", "stage2"), ("Stage",))
    (stage,) = folded.items
    assert isinstance(stage, Block)
    assert shown(stage.items) == "2×(L0)"


def test_totals_count_every_layer_of_a_fold() -> None:
    layers = [layer(i, "ab"[i % 2]) for i in range(6)]
    for items in (layers, fold(layers)):
        total = totals(items)
        assert (total.flops_before, total.flops_after, total.parameter_bytes, total.num_parameters) == (6 * 64, 6 * 16, 6 * 32, 6)


def test_a_layer_that_is_called_again_holds_its_parameters_once() -> None:
    calls = [Block("layer", "layer" if i == 0 else f"layer, call {i + 1}", "Layer", layer(0).items) for i in range(4)]
    (folded,) = fold(calls)
    assert isinstance(folded, Fold)
    assert (folded.times, folded.copies, fold_title(folded)) == (4, 1, "layer")
    total = totals([folded])
    assert (total.flops_before, total.num_parameters) == (4 * 64, 1)


def test_layers_that_differ_in_a_constant_or_a_source_line_do_not_fold() -> None:
    other = Block("layers.1", "layers.1", "Layer", (Row("compute", (line(source="model.py:9", parameter="layers.1.weight"),)),))
    assert shown(fold([layer(0), other])) == "L0 L1"
