"""`make browser`: CI gets a browser where one can be installed, and a machine without one is no failure."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPPED = "no browser is here and none can be installed: the tests in a browser will be skipped"


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        pytest.param({"chromium": "exit 1", "apt-get": "exit 1", "id": "echo 0"}, "{}/chromium", id="a browser is there"),
        pytest.param({"id": "echo 0"}, SKIPPED, id="there is no apt-get"),
        pytest.param({"apt-get": "exit 1", "id": "echo 1000"}, SKIPPED, id="not as root"),
        pytest.param(
            {"apt-get": "echo no network; exit 1", "id": "echo 0"}, f"installing Chromium\nno network\n{SKIPPED}", id="apt-get fails"
        ),
        pytest.param(
            {"apt-get": 'case "$*" in *"install -y chromium") ln -s "$0" "${0%/*}/chromium"; esac', "id": "echo 0"},
            "installing Chromium\n{}/chromium", id="apt-get installs it",
        ),
    ],
)  # fmt: skip
def test_make_browser_installs_one_where_it_can_and_never_fails(tmp_path: Path, commands: dict[str, str], said: str) -> None:
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("timeout", "tail", "ln"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    make = [str(shutil.which("make")), "--silent", "browser"]
    done = subprocess.run(make, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, said.format(tmp_path), "")
