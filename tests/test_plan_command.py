"""`autoseq plan` from the command line: what it prints, its JSON, its plot, and messages for mistakes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from autoseq.cli import app
from autoseq.plan_call import call_of, lines_of
from autoseq.plan_model import look_at, plan_training
from autoseq.plan_report import print_plan
from autoseq.planning.choice import three_digits
from autoseq.planning.degrees import Candidate, Split, candidates
from autoseq.planning.presets import load_topology
from autoseq.planning.topology import Host
from autoseq.planning.topology_file import dump
from autoseq.runtime.errors import PlanError
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.timeline import WAYS
from autoseq.target import load_target
from trainings import H100, looked, training

TINY = "examples/plain_gpt.py:tiny"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    plot = tmp_path_factory.mktemp("plots") / "sweep.png"
    shown = run(TINY, "--seq-len", "512", "--world-size", "4", "--batch", "2", "--topology", "4xA10", "--sweep", "seq-len",
                "--plot", str(plot), "--json")  # fmt: skip
    assert (shown.exit_code, shown.stderr) == (0, "")
    return json.loads(shown.stdout), plot


def test_json_is_the_documented_object(swept: tuple[dict, Path]) -> None:
    found, _ = swept
    assert list(found) == [
        "world_size", "batch", "sequence_length", "dtype", "topology", "memory_limit_bytes", "reserved_bytes", "warnings", "call", "lines",
        "beside_one_device", "plans", "attention", "sweep",
    ]  # fmt: skip
    assert (found["world_size"], found["batch"], found["sequence_length"], found["topology"]) == (4, 2, 512, "4xA10")
    best, *others = found["plans"]
    assert set(best) == {
        "data", "sequence", "mesh", "layout", "strategies", "step_seconds", "tokens_per_s", "mfu", "bytes_of_busiest_rank",
        "memory_bytes",
        "fits", "seconds", "memory", "layouts_not_taken",
    }  # fmt: skip
    assert all(each["data"] * each["sequence"] == 4 for each in found["plans"])
    assert best["step_seconds"] == pytest.approx(sum(best["seconds"].values()))
    assert best["memory_bytes"] == sum(best["memory"].values())
    assert best["tokens_per_s"] == pytest.approx(1024 / best["step_seconds"])
    assert all(three_digits(best["step_seconds"]) <= three_digits(each["step_seconds"]) for each in others if each["fits"])


def test_every_loser_has_a_reason_and_its_seconds_where_it_could_serve(swept: tuple[dict, Path]) -> None:
    for site in swept[0]["attention"]:
        assert {loser["strategy"] for loser in site["losers"]} | {site["strategy"]} == set(STRATEGIES)
        assert all((loser["seconds"] is None) == (loser["layout"] is None) == (loser["mesh"] is None) for loser in site["losers"])
        assert all(loser["reason"] for loser in site["losers"])
        assert all(loser["seconds"] is None or three_digits(loser["seconds"]) >= three_digits(site["seconds"]) for loser in site["losers"])


def test_json_says_why_a_layout_was_not_taken(swept: tuple[dict, Path]) -> None:
    for plan in swept[0]["plans"]:
        asked = {"contiguous", "zigzag"} if plan["sequence"] > 1 else {"contiguous"}
        assert {each["layout"] for each in plan["layouts_not_taken"]} == asked - {plan["layout"]}
        assert all(each["reason"] for each in plan["layouts_not_taken"])


AT_HAND = "--batch", "2", "--topology", "4xA10", "--json"


@pytest.mark.parametrize("place", [0, 5], ids=["shorter", "longer"])
def test_a_point_of_a_sweep_is_the_plan_for_that_length(swept: tuple[dict, Path], place: int) -> None:
    """The model has learned positions, so its parameters are more with more tokens."""
    point = swept[0]["sweep"]["points"][place]
    (best, *_) = json.loads(run(TINY, "--seq-len", str(point["value"]), "--world-size", "4", *AT_HAND).stdout)["plans"]
    assert point["value"] != 512 and point["best"] == best
    assert best["memory"]["parameters"] != swept[0]["plans"][0]["memory"]["parameters"]


def test_a_point_of_a_sweep_is_the_plan_for_so_many_ranks() -> None:
    asked = TINY, "--seq-len", "64", "--strategy", "ulysses", *AT_HAND
    points = json.loads(run(*asked, "--world-size", "4", "--sweep", "world-size").stdout)["sweep"]["points"]
    assert [point["value"] for point in points] == [1, 2, 4]
    for point in points[:2]:
        assert point["best"] == json.loads(run(*asked, "--world-size", str(point["value"])).stdout)["plans"][0]


SHORT = """
import torch
from inspected_models import OneAttention

def model(batch, seq_len):
    if seq_len > 128:
        raise ValueError("too long")
    return OneAttention(), {"x": torch.randn(batch, seq_len, 8)}
"""


def test_a_point_without_a_plan_says_why(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(SHORT)
    asked = "--seq-len", "64", "--world-size", "2", "--topology", "4xA10", "--sweep", "seq-len", "--strategy", "ring"
    shown = run(f"{tmp_path}/short.py:model", *asked)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert re.search(r"│ +1,024 │ no plan ", shown.stdout)
    assert re.search(r"^1,024 tokens: TARGET .* failed when called with batch=1, seq_len=1024: ValueError: too long$", shown.stdout, re.M)
    assert "Not taken:" not in shown.stdout, "no other strategy was asked for"


def test_the_sweep_has_points_and_the_plot_is_a_picture(swept: tuple[dict, Path]) -> None:
    found, plot = swept
    assert [point["value"] for point in found["sweep"]["points"]] == [512 * 2**k // 16 for k in range(9)]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_tables_and_formulas() -> None:
    shown = run(TINY, "--seq-len", "4096", "--world-size", "16", "--topology", "2x8xH100-4nic", "--formulas")
    assert (shown.exit_code, shown.stderr) == (0, "")
    for expected in (
        "1 × 4,096 tokens a step on 16 ranks of 2x8xH100-4nic (2 nodes of 8), 80.7 GB a rank for a plan, and 4.25 GB more kept free",
        "To run the first, on every rank after init_process_group", "torch.compile(model, backend=\"autoseq\", options={",
        "copies of the data × ranks that share a sequence",
        "Predicted, not measured", "data × sequence", "MFU", "Not taken:",
        "whole sequence on one rank", "T_work = ", "ring, forward:", "times Max(", "T_keys: send among all ranks",
    ):  # fmt: skip
        assert expected in shown.stdout
    assert "H_keys" not in shown.stdout, "nothing is known of what messages take of the cores"
    assert "GiB" not in shown.stdout and "ranks-per-node" not in shown.stdout


def test_a_sweep_fits_into_100_columns_and_names_degrees() -> None:
    planned = plan_training(looked(training(batch=2)), seq_len=8192, world_size=8, topology=H100, over="seq-len")
    out = Console(width=100, file=io.StringIO())
    print_plan(out, planned, given="8xH100", formulas=False)
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"^  hybrid.*: [\d.]+ [mµ]s a step on a mesh of [24] × [24]", shown, re.M)
    assert "needs several nodes" not in shown, "a mesh inside the node serves"
    _, _, swept = shown.partition("Sweep: the first plan")
    assert swept
    assert max(map(len, swept.splitlines())) <= 100
    assert re.search(r"│ ring  .*│ +[12] × [48] │", swept.replace("\n", " "))


def test_where_what_was_asked_for_does_not_fit_a_sweep_says_what_does() -> None:
    with pytest.raises(PlanError, match=r"no plan fits .*\. Of the sweep fit 1,024 tokens \([\d.]+ ms a step, [\d.]+ GB\), 2,048 "):
        plan_training(looked(training(batch=1)), seq_len=16384, world_size=2, topology=H100, memory_gib=7, over="seq-len")


def test_attentions_that_are_alike_are_told_once_wherever_they_are() -> None:
    asked = training(batch=1, layers=4)
    sites = [replace(named, site=replace(named.site, max_behind=99 if i % 2 else None)) for i, named in enumerate(asked.sites)]
    planned = plan_training(looked(replace(asked, sites=tuple(sites))), seq_len=8192, world_size=8, topology=H100)
    out = Console(width=200, file=io.StringIO())
    print_plan(out, planned, given="8xH100", formulas=False)
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert re.findall(r"^layers\S+ … \S+ \(\d ×\)", shown, re.M) == ["layers.0 … layers.2 (2 ×)", "layers.1 … layers.3 (2 ×)"]


def test_a_plan_says_for_which_dtype_it_is(swept: tuple[dict, Path]) -> None:
    assert swept[0]["dtype"] == "float32"
    assert training().dtype == "bfloat16"


AUTOCAST = """
import torch
from inspected_models import OneAttention

class Mixed(OneAttention):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)

def model(batch, seq_len):
    return Mixed(), {"x": torch.randn(batch, seq_len, 8)}
"""


def test_autocast_inside_the_model_is_told_to_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "mixed.py").write_text(AUTOCAST)
    shown = run(f"{tmp_path}/mixed.py:model", "--seq-len", "64", "--world-size", "2", "--topology", "4xA10")
    assert shown.exit_code == 0
    assert shown.stderr.count("the model enters torch.autocast, which does nothing while there are no weights") == 1
    assert "Products in float32, as the model has them" in shown.stdout


def test_what_no_mesh_of_the_ranks_serves_is_refused_once_for_all() -> None:
    shown = run(TINY, "--seq-len", "64", "--world-size", "2", "--topology", "4xA10")
    refused = "hybrid, hybrid_gather, hybrid_outer, hybrid_gather_outer, double_ring: it works on two levels and needs several nodes"
    assert refused in shown.stdout


@pytest.mark.parametrize(
    ("hardware", "told"),
    [
        pytest.param("4xA10", "1 × 4 (2 × 2): of these, 2 parts of a node, each of 2 ranks, are the mesh", id="inside a node"),
        pytest.param("2x2xA10", "1 × 4 (2 × 2): of these, 2 nodes of 2 ranks are the mesh", id="across nodes"),
    ],
)
def test_what_a_mesh_is_made_of(hardware: str, told: str) -> None:
    assert told in run(TINY, "--seq-len", "64", "--world-size", "4", "--topology", hardware, "--strategy", "hybrid").stdout


RING = 'torch.compile(model, backend="autoseq", options={"mesh": mesh["sequence"], "strategy": "ring", "layout": "zigzag"})'
LINES = {
    "one sequence": (Split(1, 8), "mesh = autoseq.sequence_mesh(8)", f"model = {RING}"),
    "copies of the data": (Split(2, 4), "mesh = autoseq.sequence_mesh(4)", 'process_group=mesh["data"].get_group()'),
    "two levels": (Split(1, 8, (2, 4)), '"cpu", (1, 2, 4), mesh_dim_names=("data", "nodes", "ranks"))', '"mesh": mesh["nodes", "ranks"]'),
    "both": (Split(2, 8, (2, 4)), '"cpu", (2, 2, 4), mesh_dim_names=("data", "nodes", "ranks"))', "DistributedDataParallel("),
    "nothing to split": (Split(8, 1), "DistributedDataParallel or FSDP, without autoseq"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ring() -> Candidate:
    """On two ranks a sequence, with zigzag rows."""
    training = look_at(partial(load_target(TINY).make, batch=2, seq_len=64), batch=2, seq_len=64, world_size=2)
    found = candidates(training, 2, load_topology("4xA10"), strategy="ring", layout="zigzag")
    return next(each for each in found if each.split.sequence == 2)


@pytest.mark.parametrize("case", LINES.values(), ids=LINES)
def test_the_lines_that_run_a_plan(ring: Candidate, case: tuple[Any, ...]) -> None:
    split, *expected = case
    shown = "\n".join(lines_of(replace(ring, split=split), training(batch=8), "4xA10"))
    assert all(each in shown for each in expected), shown


def test_the_call_of_a_plan_with_several_strategies_names_each(ring: Candidate) -> None:
    first, *others = ring.plan.sites
    mixed = replace(ring, plan=replace(ring.plan, sites=(replace(first, strategy="ulysses"), *others)))
    assert call_of(mixed, "clusters/mine.json") == (
        'torch.compile(model, backend="autoseq", '
        'options={"mesh": mesh["sequence"], "strategy": {"blocks.1": "ring", "*": "ulysses"}, "layout": "zigzag"})'
    )


def test_torch_logs_has_the_last_word() -> None:
    command = [sys.executable, "-m", "autoseq.cli", "plan", TINY, "--seq-len", "64", "--world-size", "2", "--topology", "4xA10"]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TORCH_LOGS": "+autoseq"}, check=True)
    assert "blocks.0: " in shown.stderr and "s of attention a step" in shown.stderr


def test_json_has_the_formulas_that_were_asked_for() -> None:
    shown = run(TINY, "--seq-len", "64", "--world-size", "2", "--topology", "4xA10", "--json", "--formulas")
    assert (shown.exit_code, shown.stderr) == (0, "")
    found = json.loads(shown.stdout)["formulas"]
    assert set(found["T_work"]) == {"forward", "backward"}
    assert set(found["strategies"]) == set(STRATEGIES) - {"local"}
    phases = found["strategies"]["ring"]["forward"]["phases"]
    assert any(phase["seconds"].startswith("Max(") for phase in phases)
    assert found["strategies"]["ring"]["forward"]["exchanges"][0].startswith("T_keys: send among all ranks")
    on_one_node = {name: [way for way in WAYS if "phases_on_one_node" in each[way]] for name, each in found["strategies"].items()}
    assert {name: ways for name, ways in on_one_node.items() if ways} == {"double_ring": list(WAYS)}
    forward = found["strategies"]["double_ring"]["forward"]
    assert forward["phases_on_one_node"] != forward["phases"]


def test_formulas_tell_what_messages_take_of_the_cores(tmp_path: Path) -> None:
    hardware = tmp_path / "mine.json"
    hardware.write_text(dump(replace(load_topology("4xA10"), host=Host(1e-3, 1e9))))
    shown = run(TINY, "--seq-len", "64", "--world-size", "2", "--topology", str(hardware), "--formulas", "--json")
    phases = json.loads(shown.stdout)["formulas"]["strategies"]["ring"]["forward"]["phases"]
    assert any("H_keys" in phase["seconds"] for phase in phases)


MISTAKES = {
    "an unknown topology": (["--topology", "8xH10"], 2, r"nothing is known of H10|there is no topology"),
    "ranks that do not fill nodes": (["--topology", "8xH100", "--world-size", "12"], 2, "12 ranks"),
    "fewer tokens than ranks": (["--topology", "8xH100", "--seq-len", "3"], 1, "8 ranks cannot share a batch of 1 .* --batch 4 would work"),
    "an unknown strategy": (["--topology", "8xH100", "--strategy", "rings"], 2, "did you mean 'ring'"),
    "a plot of nothing": (["--topology", "8xH100", "--plot", "out.png"], 2, "--plot draws a sweep; add --sweep"),
    "a plot of no known kind": (["--topology", "8xH100", "--sweep", "seq-len", "--plot", "out.txt"], 2, r"\.txt is no kind of picture"),
    "memory that nothing fits in": (
        ["--topology", "8xH100", "--memory-gib", "0.001"], 1,
        r"no plan fits in 1\.02 MB a rank \(53.7 kB more are kept free, --reserve\)"
    ),
    "memory without a limit": (["--topology", "8xH100", "--memory-gib", "inf"], 2, "--memory-gib inf: this is no number of GiB"),
    "a plot to nowhere": (["--topology", "8xH100", "--sweep", "seq-len", "--plot", "no/where.png"], 2, "there is no folder no"),
    "a strategy without its mesh": (
        ["--topology", "8xH100", "--world-size", "2", "--strategy", "hybrid"], 1,
        "needs several nodes of several ranks, which a sequence of this plan has not"
    ),
    "a strategy that cannot serve": (["--topology", "8xH100", "--strategy", "halo"], 1, "'halo' cannot serve"),
}


@pytest.mark.parametrize(("arguments", "status", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_a_message_and_an_exit_status(arguments: list[str], status: int, message: str) -> None:
    shown = run(TINY, "--seq-len", "64", *arguments)
    assert shown.exit_code == status
    assert re.search(message, shown.stderr), shown.stderr
    assert "Traceback" not in shown.stderr


# Formulas -------------------------------------------------------------------------------------------------------------


SAME = """
from typer.testing import CliRunner
from autoseq.cli import app

asked = ["examples/plain_gpt.py:tiny", "--seq-len", "512", "--batch", "2"]
for command in (["plan", *asked, "--topology", "2x8xA800-4nic"], ["inspect", *asked, "--world-size", "4", "--graph", "after"]):
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "k <= q" in shown.stdout, shown.output
    print(shown.stdout)
"""


def test_a_plan_and_a_rewritten_graph_are_the_same_at_every_run() -> None:
    """Whatever the order of sets, which Python draws anew in each process: ranks have to agree."""
    command = [sys.executable, "-c", SAME]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": seed}) for seed in "12"]
    (first, _), (second, _) = (each.communicate() for each in runs)
    assert first == second and [each.returncode for each in runs] == [0, 0]
