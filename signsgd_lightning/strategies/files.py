"""Checkpoint files of the Trainer's and of Fabric's strategies: what is in them, and that they are whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from .. import _compat
from ..checkpoint.atomic import PART, check_target, replace
from ..checkpoint.loading import reason_of, untrusted
from ..local_steps.rounds import find_local_steps
from ..optimizer import Signum, see_through


class Writer(Protocol):
    """A strategy, as far as files need it."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this rank writes files."""
        ...

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """How they are written."""
        ...


def has_own_state(optimizer: Any) -> bool:
    """Tell whether every rank has a state of its own of an optimizer, wrapped or not, so that it is to be gathered."""
    inner = see_through(optimizer)
    return isinstance(inner, Signum) or find_local_steps(inner) is not None


def writes_by_torch(strategy: Writer) -> bool:
    """Tell whether files are written by torch.save, at once, under the name that is asked for."""
    return type(strategy.checkpoint_io) is TorchCheckpointIO


@contextmanager
def whole_file(strategy: Writer, path: str | Path) -> Iterator[str | Path]:
    """Give the path to write to; what has the name `path` is always a whole file, whenever the run is killed.

    With a CheckpointIO plugin that is the plugin's affair.

    Raises:
        IsADirectoryError: if something else than a checkpoint has that name.
    """
    if not strategy.is_global_zero or not _compat.is_local(path) or not writes_by_torch(strategy):
        yield path
        return
    check_target(os.fspath(path))
    part = f"{os.fspath(path)}{PART}"
    yield part
    replace(part, os.fspath(path))


def check_directory(path: str | Path, storage_options: Any, remedy: str = "take such a path") -> None:
    """Make sure that a directory with shards can be written to.

    Raises:
        ValueError: if the path is on no local or mounted file system, or there are options for another.
    """
    if not _compat.is_local(path) or storage_options is not None:
        raise ValueError(
            f"a sharded checkpoint must be a directory on a file system, without storage_options, got {path}: {remedy}"
        )


@contextmanager
def naming(path: str | Path, writer: str, reader: str) -> Iterator[None]:
    """Say of a file that cannot be read which one it is, and that nothing was loaded.

    Args:
        path: of the file.
        writer: what writes such files.
        reader: what reads them, and takes ``weights_only``.

    Raises:
        RuntimeError: in the place of what the file made somebody raise.
    """
    try:
        yield
    except (EOFError, RuntimeError, UnpicklingError) as error:
        held = untrusted(error)
        if held:  # as save_hyperparameters() may have put it there
            raise RuntimeError(
                f"{path} holds {held}, which torch loads only from a file that you trust: call {reader}(…, "
                "weights_only=False), which runs what code the file may hold, or before it "
                f"torch.serialization.add_safe_globals([{held}]); nothing was loaded"
            ) from error
        raise RuntimeError(
            f"{path} is not a whole checkpoint as {writer} writes it; take an older one, nothing was loaded "
            f"({reason_of(error)})"
        ) from error


def warn_of_restarts() -> None:
    """Say so where torchrun could not connect the ranks again."""
    restarts, shared = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("MAX_RESTARTS", "USE_AGENT_STORE"))
    if restarts not in (None, "0") and shared == "True":
        rank_zero_warn(
            "torchrun is to restart workers but shares its store with them, in which those of the next attempt find"
            " the addresses of this one's and fail to connect: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and start"
            " it with --standalone, or on several machines with --rdzv-backend c10d"
        )
