"""One device: a training step of a decoder under autoseq, beside torch.compile with Inductor, at lengths where the dense mask hurts.

    python benchmarks/one_device.py --seq-len 4096 8192

Each case runs in a process of its own, so that its peak memory is its own. Prints a table; `--json FILE` writes the numbers too.
Times are medians of a few steps after compilation; on a shared machine read only their ratios.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

BACKENDS = ("inductor", "autoseq")


def measure(backend: str, seq_len: int, layers: int, steps: int) -> dict[str, float | int | str]:
    """Peak memory of a step, above what is in use before it, and the median time of one forward and backward, in this process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=seq_len, use_cache=False,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype)
    ids = torch.randint(0, 512, (1, seq_len), device=device)
    step = torch.compile(model, backend=backend)
    seconds: list[float] = []
    before = 0
    for _ in range(steps + 1):
        if len(seconds) == 1:  # compiling takes memory of its own
            before = _start_of_peak(device)
        start = time.perf_counter()
        loss = step(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "backend": backend, "seq_len": seq_len, "device": device, "loss": loss.item(), "compile_and_first_step_s": seconds[0],
        "step_s": statistics.median(seconds[1:]), "peak_bytes": _peak_bytes(device) - before,
    }  # fmt: skip


def _start_of_peak(device: str) -> int:
    """Forget the peak so far; returns the bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to reset VmHWM
    return _status_bytes("VmRSS")


def _peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def main(
    seq_len: Annotated[list[int], typer.Option(help="Tokens; give it several times.")] = [4096, 8192],  # noqa: B006 (typer's way)
    layers: int = 2,
    steps: int = 3,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    only: Annotated[str, typer.Option(help="Measure one backend in this process and print JSON.")] = "",
) -> None:
    """Measure every backend at every length."""
    if only:
        typer.echo(json.dumps(measure(only, seq_len[0], layers, steps)))
        return
    results = [_in_a_process(backend, length, layers, steps) for length in seq_len for backend in BACKENDS]
    table = Table("tokens", "backend", "peak memory of a step", "step", "first step with compilation", "loss")
    for r in results:
        table.add_row(str(r["seq_len"]), str(r["backend"]), f"{float(r['peak_bytes']) / 1e6:,.0f} MB", f"{r['step_s']:.2f} s",
                      f"{r['compile_and_first_step_s']:.0f} s", f"{r['loss']:.6f}")  # fmt: skip
    Console(width=140).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1))


def _in_a_process(backend: str, seq_len: int, layers: int, steps: int) -> dict[str, float | int | str]:
    command = [sys.executable, __file__, "--only", backend, "--seq-len", str(seq_len), "--layers", str(layers), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{backend} at {seq_len} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    typer.run(main)
