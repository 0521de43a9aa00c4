"""Checkpoints that are whole whenever the run is killed: written under another name, and renamed in one step."""

import ctypes
import os
import shutil
from pathlib import Path

META = "meta.pt"
"""What a directory must hold to be a checkpoint."""

PART = ".part"
"""Ends the name of what is not whole yet, or no longer."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


def check_target(path: str) -> None:
    """Make sure that no directory is in the way that is not a checkpoint.

    Raises:
        IsADirectoryError: if one is.
    """
    if os.path.isdir(path) and os.listdir(path) and not os.path.isfile(os.path.join(path, META)):
        raise IsADirectoryError(f"{path} is a directory with something else than a checkpoint in it; take another name")


def replace(part: str, path: str) -> None:
    """Give what was written as `part` its name, in one step whatever has that name now."""
    if os.path.lexists(path) and (os.path.isdir(part) or os.path.isdir(path)):
        _exchange(part, path)
        remove(part)
    else:
        os.replace(part, path)


def remove_directory(path: str) -> None:
    """Remove a checkpoint that is a directory; it loses its name first."""
    remove(f"{path}{PART}")
    os.replace(path, f"{path}{PART}")
    remove(f"{path}{PART}")


def _exchange(a: str, b: str) -> None:
    """Exchange two names; where the file system cannot do it in one step, `b` is missing for a moment."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(a), os.fsencode(b)
    if renameat2 is None or renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        old = f"{a}.old"
        remove(old)
        os.replace(b, old)
        try:
            os.replace(a, b)
        except OSError:
            os.replace(old, b)
            raise
        os.replace(old, a)


def remove(path: str) -> None:
    """Remove a file or a directory, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)
