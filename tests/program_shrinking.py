"""Makes a failing program smaller, and prints it as Python that a person can run.

This is delta debugging on the list of statements, not hypothesis: a long run is resumed by seed on any version of anything, its
programs are told apart by what became of them, and any sublist of statements is a program already, which is all that shrinking
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import getsource

from program_check import RATE, inputs_of, train
from program_text import IMPORTS, RandomProgram, program_text

Fails = Callable[[RandomProgram], bool]

SIMPLEST = {
    "steps": 1, "inner": "eager", "outputs": "deferred", "returns": "rows", "P": 2, "wide": True, "batch": 1, "layout": "contiguous",
    "strategy": "gather_kv", "length": 5, "other_length": 5,
}  # fmt: skip


def shrunk(program: RandomProgram, fails: Fails) -> RandomProgram:
    """A program that fails alike, of which nothing can be left out or made simpler."""
    while (better := next((each for each in _simpler(program) if fails(each)), None)) is not None:
        program = better
    return program


def _simpler(program: RandomProgram) -> Iterator[RandomProgram]:
    lines = program.lines
    for size in sorted({len(lines) // 2, 2, 1} - {0}, reverse=True):
        for start in range(0, len(lines), size):
            yield replace(program, lines=lines[:start] + lines[start + size :])
    for field, simplest in SIMPLEST.items():
        if getattr(program, field) != simplest:
            yield replace(program, **{field: simplest})
    for at, line in enumerate(lines):
        if any(line.numbers):
            yield replace(program, lines=(*lines[:at], replace(line, numbers=(0,) * len(line.numbers)), *lines[at + 1 :]))


HEAD = """from __future__ import annotations

import copy
from types import SimpleNamespace
"""

MAIN = """

program = SimpleNamespace(seed={seed}, wide={wide}, batch={batch}, length={length}, other_length={other_length}, steps={steps})
RATE = {rate}


{inputs_of}

{train}

dist.init_process_group("gloo")
torch.manual_seed({seed})
model = Program().to({dtype})
oracle = copy.deepcopy(model)
torch.manual_seed({seed})
expected = train(oracle, oracle, program)
torch.manual_seed({seed})
actual = train(model, torch.compile(model, backend="autoseq", options={options}), program)
for name, value in expected.items():
    if value is None or actual[name] is None:
        print(dist.get_rank(), name, "is" if value is actual[name] else "IS NOT", "None on both")
    else:
        print(dist.get_rank(), name, (actual[name].double() - value.double()).norm().item())
"""


def script(program: RandomProgram) -> str:
    """A file for torchrun that prints how far every value is from one device's."""
    main = MAIN.format(
        seed=program.seed, wide=program.wide, batch=program.batch, length=program.length, other_length=program.other_length,
        steps=program.steps, rate=RATE, dtype="torch.float64" if program.wide else "torch.float32", options=program.options,
        inputs_of=getsource(inputs_of), train=getsource(train),
    )  # fmt: skip
    imports = f"{IMPORTS}import torch.distributed as dist\nfrom torch.utils._pytree import tree_flatten_with_path\n"
    return f'"""torchrun --nproc-per-node {program.P} THIS.py"""\n{HEAD}\n{imports}\n{program_text(program)}{main}'
