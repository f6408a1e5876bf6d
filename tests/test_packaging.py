"""A plain install holds every module, as setuptools packs only the folders that pyproject.toml lists; and CI gets its browser."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Where each part of the package lies, and what it is imported as.
HOMES = {"autoseq": "autoseq", "passes": "autoseq.passes", "runtime": "autoseq.runtime"}


def folders_with_python() -> dict[str, str]:
    """The import name of every folder that holds Python files, and the folder itself."""
    found = {}
    for home, package in HOMES.items():
        for folder in {file.parent for file in (ROOT / home).rglob("*.py")}:
            found[".".join([package, *folder.relative_to(ROOT / home).parts])] = folder.relative_to(ROOT).as_posix()
    return found


def test_every_folder_with_python_files_is_installed_and_no_other() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == folders_with_python()
    assert sorted(settings["packages"]) == sorted(settings["package-dir"])


def test_every_other_file_of_the_package_is_installed_too() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {file for package, patterns in settings["package-data"].items() for each in patterns for file in folder(package).glob(each)}
    there = {file for home in HOMES for file in (ROOT / home).rglob("*.*") if file.suffix not in (".py", ".pyc")}
    assert there == listed


def folder(package: str) -> Path:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return ROOT / settings["package-dir"][package]


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
