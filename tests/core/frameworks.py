"""The arrays of every framework, for functions that must run on all of them; each is imported when first needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Convert = Callable[[npt.NDArray[Any]], Any]


def _torch(array: npt.NDArray[Any]) -> Any:
    import torch

    return torch.from_numpy(np.array(array))


def _tensorflow(array: npt.NDArray[Any]) -> Any:
    import tensorflow

    return tensorflow.constant(array)


def _jax(array: npt.NDArray[Any]) -> Any:
    import jax.numpy

    return jax.numpy.asarray(array)


FRAMEWORKS: dict[str, Convert] = {"numpy": np.array, "torch": _torch, "tensorflow": _tensorflow, "jax": _jax}
"""Name -> conversion of a NumPy array to the framework's own."""


@dataclass(frozen=True)
class Kind:
    """Words of one framework and width, made from an array of booleans and read as one; 64 coordinates at least."""

    framework: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.framework}-{self.dtype}"

    def words(self, bits: npt.NDArray[np.bool_]) -> Any:
        packed = np.packbits(bits, bitorder="little")
        if self.framework == "python":
            return int.from_bytes(packed.tobytes(), "little")
        return FRAMEWORKS[self.framework](packed.view(self.dtype))

    def bits(self, words: Any, length: int) -> npt.NDArray[np.bool_]:
        if self.framework == "python":
            data = (words & ((1 << length) - 1)).to_bytes(length // 8, "little")
            packed = np.frombuffer(data, np.uint8)
        else:
            array = np.asarray(words)
            assert array.dtype == self.dtype
            packed = array.view(np.uint8)
        return np.unpackbits(packed, bitorder="little").astype(bool)

    def ballots(self, signs: npt.NDArray[np.integer[Any]], planes: int) -> list[list[Any]]:
        """Ballots of the workers whose votes are the rows of `signs`, -1, 0 or +1."""
        return [[self.words(plane) for plane in (row < 0, row != 0)[:planes]] for row in signs]

    def verdict(self, ballot: Sequence[Any], length: int) -> npt.NDArray[np.int64]:
        """A verdict as -1, 0 or +1."""
        negative, *voted = [self.bits(plane, length) for plane in ballot]
        signs = np.where(negative, -1, 1)
        return np.where(voted[0], signs, 0) if voted else signs


KINDS = [
    Kind("numpy", "uint8"),
    Kind("numpy", "uint64"),
    Kind("python", "int"),
    Kind("torch", "uint8"),
    Kind("torch", "int64"),
    Kind("tensorflow", "uint8"),
    Kind("tensorflow", "int32"),
    Kind("jax", "uint8"),
    Kind("jax", "int32"),
]
