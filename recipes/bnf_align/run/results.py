"""Where a command's result goes, settled before the work that makes it."""

import os
from pathlib import Path

from bnf_core.errors import UserError


def result_file(name: str, setting: str) -> Path:
    """The path of a report or picture, its folder made.

    Raises:
        UserError: it is a folder, or nothing can be written there.
    """
    path = Path(name).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting} {name}: its folder cannot be made: {error.strerror}") from error
    if path.is_dir():
        raise UserError(f"{setting} {name} is a folder: expected the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{setting} {name} cannot be written: permission denied")
    return path
