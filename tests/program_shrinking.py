"""Makes a failing program smaller, and prints it as Python that a person can run.

This is delta debugging on the list of statements, not hypothesis: a long run is resumed by seed on any version of anything, its
programs are told apart by what became of them, and any sublist of statements is a program already, which is all that shrinking
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

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


MAIN = """

def steps(model, run):
    values = {{}}
    for step in range({steps}):
        drawn = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 16, ({batch}, {length}), generator=drawn)
        rows = torch.randn({batch}, {length}, 8, generator=drawn, dtype={dtype}).requires_grad_()
        others = torch.randn({batch}, {other_length}, 8, generator=drawn, dtype={dtype}).requires_grad_()
        mask = torch.arange({length}) < torch.randint(1, {length} + 1, ({batch}, 1), generator=drawn)
        outputs = tree_leaves(run(ids, rows, others, mask))
        sum((out * torch.randn(out.shape, generator=drawn)).sum() for out in outputs if out.is_floating_point()).backward()
        named = {{f"output {{i}}": out.detach() + 0 for i, out in enumerate(outputs)}}
        named |= {{"gradient of rows": rows.grad, "gradient of others": others.grad}}
        named |= {{f"gradient of {{name}}": parameter.grad for name, parameter in model.named_parameters()}}
        values |= {{f"step {{step}}: {{name}}": value for name, value in named.items()}}
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(0.05 * parameter.grad)
                parameter.grad = None
    return values | {{f"at the end: {{name}}": value.clone() for name, value in model.state_dict().items()}}


dist.init_process_group("gloo")
torch.manual_seed({seed})
model = Program().to({dtype})
oracle = copy.deepcopy(model)
expected = steps(oracle, oracle)
actual = steps(model, torch.compile(model, backend="autoseq", options={options}))
for name, value in expected.items():
    if value is None or actual[name] is None:
        print(dist.get_rank(), name, "is" if value is actual[name] else "IS NOT", "None on both")
    else:
        print(dist.get_rank(), name, (actual[name].double() - value.double()).norm().item())
"""


def script(program: RandomProgram) -> str:
    """A file for torchrun that prints how far every value is from one device's."""
    main = MAIN.format(
        steps=program.steps, batch=program.batch, length=program.length, other_length=program.other_length, seed=program.seed,
        dtype="torch.float64" if program.wide else "torch.float32", options=program.options,
    )  # fmt: skip
    imports = f"import copy\n\n{IMPORTS}import torch.distributed as dist\nfrom torch.utils._pytree import tree_leaves\n"
    return f'"""torchrun --nproc-per-node {program.P} THIS.py"""\n{imports}\n{program_text(program)}{main}'
