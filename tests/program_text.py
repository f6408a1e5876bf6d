"""A random program is data: a list of statements and how it is called. Here it is drawn from a seed, and becomes Python.

Every list of statements is a program: a statement reads, by number, one of the variables that are there. So a list stays one
when statements are left out, which is how a failing program is made smaller.
"""

from __future__ import annotations

import json
import random
import textwrap
from dataclasses import asdict, dataclass
from typing import Any, Literal

from program_statements import ACROSS_ROWS, ATTENTIONS, BREAKS, POINTWISE, REGIONS, STATEMENTS, WRITES, W

Returned = Literal["rows", "loss", "several", "dict", "aliases"]


@dataclass(frozen=True, slots=True)
class Line:
    """A statement of the table, or a region; the numbers choose its variables, and are its own integer."""

    name: str
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RandomProgram:
    """What a program does, and how it is called and compiled."""

    seed: int
    lines: tuple[Line, ...]
    returns: Returned = "rows"
    P: int = 2
    batch: int = 2
    length: int = 7
    other_length: int = 5
    steps: int = 1
    wide: bool = True  # float64
    inner: str = "eager"
    strategy: str = "auto"
    layout: str = "auto"
    outputs: str = "deferred"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RandomProgram:
        fields = json.loads(text)
        lines = tuple(Line(line["name"], tuple(line["numbers"])) for line in fields.pop("lines"))
        return cls(lines=lines, **fields)

    @property
    def options(self) -> dict[str, Any]:
        """Those of the backend."""
        return {"inner": self.inner, "strategy": self.strategy, "layout": self.layout, "outputs": self.outputs}


def draw_program(seed: int) -> RandomProgram:
    """The program of a seed: the same in every process and version of Python."""
    rng = random.Random(f"autoseq {seed}")
    lines = [_draw_line(rng) for _ in range(rng.randint(1, 5))]
    lines.insert(rng.randint(0, len(lines)), Line(_choose(rng, ATTENTIONS), _numbers(rng)))
    P = rng.choice([1, 2, 2, 2, 3, 3, 4])
    return RandomProgram(
        seed, tuple(lines), returns=rng.choice(["rows", "rows", "loss", "several", "several", "dict", "aliases"]), P=P,
        batch=rng.randint(1, 3), length=rng.randint(max(5, P), 13), other_length=rng.randint(max(3, P), 11), steps=rng.choice([1, 1, 2]),
        wide=rng.random() < 0.85, inner="aot_eager" if rng.random() < 0.04 else "eager",
        strategy=rng.choice(["auto", "auto", "ring", "ulysses", "gather_kv"]), layout=rng.choice(["auto", "contiguous", "zigzag"]),
        outputs=rng.choice(["deferred", "deferred", "deferred", "full"]),
    )  # fmt: skip


def _draw_line(rng: random.Random) -> Line:
    table = rng.choices(["attention", "pointwise", "across", "write", "break", "region"], [8, 22, 24, 34, 5, 7])[0]
    if table == "region":
        return Line(rng.choice(REGIONS), (rng.randint(1, 3),))
    tables = {"attention": ATTENTIONS, "pointwise": POINTWISE, "across": ACROSS_ROWS, "write": WRITES, "break": BREAKS}
    return Line(_choose(rng, tables[table]), _numbers(rng))


def _choose(rng: random.Random, table: dict[str, Any]) -> str:
    return rng.choice(sorted(table))


def _numbers(rng: random.Random) -> tuple[int, ...]:
    # Most often the newest variable is meant.
    return tuple(rng.choice([0, 0, 0, 0, 0, 1, 2, 3]) for _ in range(4))


HEAD = f"""
class Program(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.table, self.bounded = nn.Embedding(16, {W}), nn.Embedding(64, {W}), nn.Embedding(16, {W}, max_norm=1.0)
        self.q, self.k, self.v, self.out = (nn.Linear({W}, {W}) for _ in range(4))
        self.k1, self.v1 = nn.Linear({W}, {W} // 4), nn.Linear({W}, {W} // 4)
        self.lin, self.lin2, self.norm, self.bn = nn.Linear({W}, {W}), nn.Linear({W}, {W}), nn.LayerNorm({W}), nn.BatchNorm1d({W})
        self.conv, self.mha = nn.Conv1d({W}, {W}, 3, padding=1), nn.MultiheadAttention({W}, 2, batch_first=True)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, {W}))
        self.register_buffer("ema", torch.linspace(-1, 1, {W}))
        self.register_buffer("history", torch.zeros(64, {W}))
        self.register_buffer("count", torch.tensor(1))
        self.chosen, self.rates = {{"lin", "norm"}}, {{"near": 0.3, "far": 0.2}}

    def forward(self, ids, rows, others, mask):
        x0 = self.tokens(ids) + rows
        c0, s0 = others[:, 0], x0.mean()
"""


def program_text(program: RandomProgram) -> str:
    """The module of a program, without its imports."""
    return HEAD + textwrap.indent("\n".join(_Writer(program).text()), " " * 8) + "\n"


class _Writer:
    """Writes statements with the variables that are there."""

    def __init__(self, program: RandomProgram) -> None:
        self._lines, self._returns = list(program.lines), program.returns
        self._known = {"x": ["x0"], "k": ["others"], "i": ["ids"], "m": ["mask"], "c": ["c0"], "s": ["s0"]}
        self._made = 0

    def text(self) -> list[str]:
        text: list[str] = []
        while self._lines:
            text += self._next()
        return [*text, f"return {self._result()}"]

    def _next(self) -> list[str]:
        line = self._lines.pop(0)
        return self._region(line) if line.name in REGIONS else self._statement(line)

    def _statement(self, line: Line) -> list[str]:
        statement = STATEMENTS[line.name]
        words: dict[str, Any] = {"n": line.numbers[-1] % 4, "W": W}
        for letter, number in zip(statement.reads, line.numbers, strict=False):
            known = self._known["x" if letter == "y" else letter]
            words[letter] = known[-1 - number % len(known)]
        if statement.makes:
            self._made += 1
            words["o"] = f"{statement.makes}{self._made}"
            self._known[statement.makes].append(words["o"])
        return statement.text.format(**words).splitlines()

    def _region(self, line: Line) -> list[str]:
        inside, self._lines = self._lines[: line.numbers[0]], self._lines[line.numbers[0] :]
        inside = [each for each in inside if each.name not in REGIONS and (line.name == "no_grad" or STATEMENTS[each.name].repeats)]
        if line.name == "no_grad":
            body = [text for each in inside for text in self._statement(each)]
            return ["with torch.no_grad():", *(f"    {text}" for text in body or ["pass"])]
        return self._checkpoint(inside)

    def _checkpoint(self, inside: list[Line]) -> list[str]:
        """What is made inside is known there only, but for the newest rows."""
        known, given = {kind: list(names) for kind, names in self._known.items()}, self._known["x"][-1]
        body = [text for each in inside for text in self._statement(each)]
        result = self._known["x"][-1]
        self._known = known
        self._made += 1
        made, part = f"x{self._made}", f"part{self._made}"
        known["x"].append(made)
        text = [f"def {part}({given}):", *(f"    {each}" for each in body), f"    return {result} * 1"]
        return [*text, f"{made} = checkpoint({part}, {given}, use_reentrant=False)"]

    def _result(self) -> str:
        rows, vector, number, integers = (self._known[kind][-1] for kind in "xcsi")
        return {
            "rows": rows,
            "loss": f"F.cross_entropy({rows}[:, :-1].flatten(0, 1), ids[:, 1:].flatten() % {W})",
            "several": f"{rows}, {vector}, {number}, {self._known['k'][-1]}, {integers}",
            "dict": f"{{'rows': {rows}, 'first': {self._known['x'][0]}, 'loss': {number} + {rows}.square().mean(), 'ids': {integers}}}",
            "aliases": f"{rows}, {rows}[:, 1:], {rows}, {self._known['x'][len(self._known['x']) // 2]}",
        }[self._returns]


IMPORTS = """import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
"""
