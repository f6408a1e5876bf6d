"""A plain install holds every module, as setuptools packs only the folders that pyproject.toml lists."""

import tomllib
from pathlib import Path

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
