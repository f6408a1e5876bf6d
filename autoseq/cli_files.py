"""Files that commands write: a mistake in a path is found before the work, and is a message."""

import os
from pathlib import Path

from autoseq.runtime.errors import OptionError


def check_writable(option: str, path: Path | None) -> None:
    """Raises OptionError where the file that an option names could not be written, as far as that shows without writing it."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise OptionError(f"{option} {path}: this is a folder; name a file in it")
        if not path.parent.is_dir():
            raise OptionError(f"{option} {path}: there is no folder {path.parent}")
        needed = path if path.exists() else path.parent
    except OSError as error:  # such as a name that is too long
        raise OptionError(f"{option} {path}: {error.strerror or error}") from error
    if not os.access(needed, os.W_OK):
        raise OptionError(f"{option} {path}: {needed} may not be written")


def write_file(option: str, path: Path, text: str) -> None:
    """Write the file that an option names. Raises OptionError."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise OptionError(f"{option} {path}: {error.strerror or error}") from error
