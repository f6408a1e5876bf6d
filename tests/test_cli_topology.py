"""`autoseq topology`: lists, shows, measures; a mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from autoseq.cli import app
from autoseq.planning import measure as measuring
from autoseq.planning.measure import Request
from autoseq.planning.presets import load_topology, names
from autoseq.planning.topology import Topology
from autoseq.planning.topology_file import parse_topology


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["topology", *arguments])


def test_list() -> None:
    result = run("list")
    assert result.exit_code == 0
    for name in names():
        assert name in result.stdout
    assert "2x8xH100-4nic is two nodes of four network cards each" in result.stdout
    assert json.loads(run("list", "--json").stdout) == names()


def test_show() -> None:
    result = run("show", "2x8xA800-4nic")
    assert result.exit_code == 0
    texts = ("2 nodes of 8 ranks", "inside a node (full duplex)", "4 network cards a node", "all_to_all", "145 GB/s", "312 TFLOP/s")
    for text in (*texts, "arXiv:2307.08691", "85 GB (79.2 GiB) each. GB are 10^9 bytes, GiB 2^30."):
        assert text in result.stdout


def test_shown_as_json_it_is_a_file_to_give_back(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(run("show", "2x8xA800-4nic", "--json").stdout)
    assert load_topology(tmp_path / "mine.json") == load_topology("2x8xA800-4nic")
    assert run("show", str(tmp_path / "mine.json")).stdout == run("show", "2x8xA800-4nic").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("show", "8xH10"), "nothing is known of H10 (did you mean 'H100'?)", id="no such topology"),
        pytest.param(("measure", "--world-size", "4", "--ranks-per-node", "3"), "4 ranks are not whole nodes of 3", id="no whole nodes"),
        pytest.param(("measure", "-o", "nowhere/at/all.json"), "there is no folder nowhere/at", id="no folder to write to"),
        pytest.param(("measure", "-o", "."), "this is a folder; name a file in it", id="a folder to write to"),
        pytest.param(("measure", "-o", "a" * 300), "File name too long", id="no name for a file"),
        pytest.param(("show", "~nosuchuser/x.json"), "topology '~nosuchuser/x.json' cannot be read", id="nobody's home"),
        pytest.param(("show", "a" * 300), "File name too long", id="no name of a topology"),
        pytest.param(("show", "a\0.json"), "cannot be read: embedded null byte", id="no path"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Request, int]]:
    """What would be measured; it is not."""
    requests: list[tuple[Request, int]] = []

    def here(request: Request, world_size: int) -> Topology:
        requests.append((request, world_size))
        return load_topology("8xH100")

    monkeypatch.setattr(measuring, "measure_here", here)
    monkeypatch.setattr(measuring, "measure_launched", lambda request: here(request, 0))
    return requests


def test_measure_writes_a_file_and_shows_it_or_prints_the_file(asked: list[tuple[Request, int]], tmp_path: Path) -> None:
    options = ("--world-size", "4", "--ranks-per-node", "2", "--nics", "2", "--dtype", "bfloat16")
    result = run("measure", *options, "-o", str(tmp_path / "mine.json"))
    assert result.exit_code == 0
    assert "1 node of 8 ranks" in result.stdout
    assert load_topology(tmp_path / "mine.json") == load_topology("8xH100")
    assert parse_topology(run("measure").stdout, "printed") == load_topology("8xH100")
    assert asked == [(Request(2, 2, ("bfloat16",)), 4), (Request(2), 2)]


def test_a_measurement_is_not_lost_if_its_file_cannot_be_written(asked: list[tuple[Request, int]], tmp_path: Path) -> None:
    out = tmp_path / "mine.json"

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", no_room)
        result = run("measure", "-o", str(out))
    assert len(asked) == 1
    assert result.exit_code == 2
    assert f"-o {out}: No space left on device" in result.stderr
    assert parse_topology(result.stdout, "printed") == load_topology("8xH100")


def test_where_a_file_may_not_be_written_nothing_is_measured(
    asked: list[tuple[Request, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    result = run("measure", "-o", str(tmp_path / "mine.json"))
    assert (result.exit_code, result.stdout, asked) == (2, "", [])
    assert f"{tmp_path} may not be written" in result.stderr


def test_a_launched_rank_measures_with_the_others_and_rank_0_writes(
    asked: list[tuple[Request, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "mine.json"
    assert (run("measure", "-o", str(out)).stdout, out.exists()) == ("", False)
    monkeypatch.setenv("RANK", "0")
    assert run("measure", "-o", str(out)).exit_code == 0
    assert out.exists()
    assert asked == [(Request(4), 0)] * 2
    result = run("measure", "--world-size", "2")
    assert (result.exit_code, "one of 8 ranks already" in result.stderr) == (2, True)
