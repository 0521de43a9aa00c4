"""The table of contents of torch's sharded checkpoints, read once and as data."""

import pickle
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

_INDEX = ".metadata"  # torch's name for it


class Reader(FileSystemReader):
    """Goes by an index that was read before."""

    def __init__(self, path: str, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self) -> Metadata:
        """Return it."""
        return self.index


def read_index(path: str) -> Metadata:
    """Return what a directory of torch's holds.

    Raises:
        pickle.UnpicklingError: if its index is anything else than torch's records.
    """
    with Path(path, _INDEX).open("rb") as file:
        index = _Unpickler(file).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(f"its {_INDEX} holds {type(index).__name__}")
    return index


class _Unpickler(pickle.Unpickler):
    """Makes what torch's index consists of, and nothing else: a checkpoint is data, not code."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        torchs = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        record = torchs and isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
        plain = module == "torch" and (name == "Size" or isinstance(found, torch.dtype))
        path = isinstance(found, type) and issubclass(found, PurePath)
        if record or plain or path or (module, name) == ("torch.serialization", "_get_layout"):
            return found
        raise pickle.UnpicklingError(f"its {_INDEX} holds {module}.{name}")
