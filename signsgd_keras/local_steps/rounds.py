"""What workers have in common between rounds of local steps, and how they close one (L1-L4)."""

import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

import signsgd_core as core
from signsgd_core.adversaries import Adversary
from signsgd_core.analysis.vote_figures import COUNTS
from signsgd_core.local_steps import widened
from signsgd_core.wire import DIGEST_BYTES, Digests, digest, find_difference

from .. import _compat
from ..variables import path
from ..vote.agreement import agree
from ..vote.verification import ReplicasDifferError
from .exchange import Exchange
from .packed_vote import PackedVote

Array = npt.NDArray[Any]


class Closed(NamedTuple):
    """What all workers said in the exchange by which a round closed.

    Attributes:
        stages: theirs.
        moved: whether anyone moved a variable.
        counts: their `COUNTS` before this round, shape (workers, 9).
    """

    stages: npt.NDArray[np.int32]
    moved: bool
    counts: npt.NDArray[np.float64]


class Rounds:
    """The parameters `x_0` after the last round, the outer momentum, and how a round closes.

    Args:
        model: that all workers train, which `begin` wants to be built.
        exchange: between all workers.
        outer_lr: η.
        outer_momentum: μ.
        adversaries: worker -> what it makes of its displacements.

    Attributes:
        t: how many rounds moved a trainable variable.
        momenta: ``u`` of each trainable variable, float32; none if μ is 0.
    """

    def __init__(
        self,
        model: Any,
        exchange: Exchange,
        outer_lr: float,
        outer_momentum: float,
        adversaries: Mapping[int, Adversary],
    ) -> None:
        self._model, self._unbuilt = model, _compat.unbuilt_layers(model)
        self._trainable, self._exchange = list(model.trainable_variables), exchange
        self._buffers = [v for v in model.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]
        self._vote = PackedVote(exchange, [int(np.prod(v.shape)) for v in self._trainable])
        self._adversary = adversaries.get(self._vote.rank)
        self._outer = outer_lr, outer_momentum
        self.t, self.is_first_worker = 0, self._vote.rank == 0
        self._read()
        self.momenta = [np.zeros(x.shape, np.float32) for x in self._start] if outer_momentum else []
        fields = {"counts": (np.float64, len(COUNTS)), "stage": (np.int32, 2)}  # whole words of either
        fields |= {"magnitudes": (np.float32, len(self._trainable)), "moved": (np.int32, len(self._buffers))}
        self._row = np.dtype([(name, dtype, (count,)) for name, (dtype, count) in fields.items()])

    def begin(self, settings: dict[str, Any]) -> None:
        """Make sure that all workers have the same settings and variables, and start from worker 0's.

        Args:
            settings: by name.

        Raises:
            ValueError: if they differ, naming the first difference, or if variables are yet to come; on all workers.
        """
        trainable = [f"{path(v)}: shape {tuple(v.shape)}, {v.dtype}" for v in self._trainable]
        buffers = [f"{path(v)}: shape {tuple(v.shape)}, {v.dtype}, not trained" for v in self._buffers]
        agree(self._exchange, {**settings, "unbuilt layers": self._unbuilt}, trainable + buffers)
        if self._unbuilt or not self._trainable:  # Keras would make them in the first step, unseen by the vote
            lacking = f"is not built ({', '.join(self._unbuilt)})" if self._unbuilt else "has none to train"
            raise ValueError(
                f"LocalVote votes on the variables that a model has when fit() starts, and this one {lacking}: call "
                "the model on one batch first, or give it keras.Input, and leave out layers that it never calls"
            )
        values = self._exchange.broadcast([*self._start, *self._kept, *self.momenta, np.array([self.t])])
        first, last = len(trainable), len(trainable + buffers)
        self._write(values[:first], values[first:last])
        self.momenta, self.t = values[last:-1], int(values[-1][0])

    def close(self, stage: int, stepped: bool) -> Closed:
        """Close a round with all other workers; one in which nobody moved a trainable variable is not counted.

        Args:
            stage: of this worker, for the others.
            stepped: whether it took steps since the last round; if not, it abstains.

        Raises:
            ValueError: if the model has trainable variables that it did not have at the start.
            RuntimeError: if a worker is lost; then the variables are those of the round's beginning.
        """
        self._check_variables()
        sent, seconds = self._exchange.sent_bytes, self._exchange.seconds
        try:
            ends = [v.numpy() for v in self._buffers] if stepped else self._kept
            seen, verdicts = self._decide(stage, ends, stepped)
            means = self._means(ends, seen["moved"] != 0)
        except RuntimeError:
            self._write(self._start, self._kept)
            raise
        self._vote.add(sent_bytes=self._exchange.sent_bytes - sent, seconds=self._exchange.seconds - seconds)
        moved = bool(verdicts or seen["moved"].any())
        if stepped or moved:
            self._commit(verdicts, core.median_magnitudes(seen["magnitudes"]), means)
        return Closed(seen["stage"][:, 0], moved, seen["counts"])

    def save(self, path: str) -> None:
        """Write the number of rounds and the outer momenta to a file, with a digest of the parameters."""
        momenta = {f"momentum{k}": u for k, u in enumerate(self.momenta)}
        with open(f"{path}.part", "wb") as file:
            np.savez(file, t=self.t, digest=self._digest(), **momenta)  # type: ignore[arg-type]
        os.replace(f"{path}.part", path)

    def load(self, path: str) -> None:
        """Go on from a file, if the parameters are those that it was written with; otherwise warn.

        Raises:
            ValueError: if it is broken, or another file.
        """
        try:
            self._load(path)
        except (ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path} is broken, or LocalVote did not write it: remove it, or name another") from error

    def _load(self, path: str) -> None:
        with np.load(path) as saved:
            if not np.array_equal(saved["digest"], self._digest()):
                warnings.warn(
                    f"{path} is of other parameters than the model's, and the outer momentum starts at zero: load the "
                    "weights that were saved with it, or remove it",
                    stacklevel=2,
                )
                return
            self.t = int(saved["t"])
            self.momenta = [saved.get(f"momentum{k}", u) for k, u in enumerate(self.momenta)]

    def verify(self) -> None:
        """Make sure that all workers hold the same variables and outer momenta, bit for bit.

        Raises:
            ReplicasDifferError: if not, on all workers.
        """
        momenta: Sequence[Sequence[Array]] = [[u] for u in self.momenta] or [[] for _ in self._start]
        held = [[v.numpy(), *u] for v, u in zip(self._trainable, momenta, strict=True)]
        held += [[v.numpy()] for v in self._buffers]
        ours = np.stack([np.frombuffer(digest(parts), np.uint8) for parts in held])[None]

        def gather(digests: Digests) -> Digests:
            rows = self._exchange.gather(np.ascontiguousarray(digests).reshape(-1).view(np.int32))
            return rows.view(np.uint8).reshape(len(rows), -1, DIGEST_BYTES)

        found = find_difference(ours, gather, gather)
        if found is not None:
            number, workers = found
            variable = path([*self._trainable, *self._buffers][number])
            raise ReplicasDifferError(workers, self.t, variable, ("round", "worker", "outer momentum"))

    def _decide(self, stage: int, ends: Sequence[Array], stepped: bool) -> tuple[Any, dict[int, Array]]:
        """Return the rows of all workers, and the verdicts by their variables' numbers (L1-L3)."""
        deltas = list(map(self._displacement, self._start, self._trainable)) if stepped else []
        ours = np.zeros(1, self._row)
        ours["counts"], ours["stage"] = self._vote.counts, stage
        ours["magnitudes"] = [core.magnitude(delta) for delta in deltas] or 0
        ours["moved"] = [_moved(kept, end) for kept, end in zip(self._kept, ends, strict=True)]
        seen = self._exchange.gather(ours.view(np.int32)).view(self._row)[:, 0]
        return seen, self._vote.verdicts(deltas, seen["magnitudes"] > 0, self.t)

    def _check_variables(self) -> None:
        """Make sure that no trainable variable is left out of the vote."""
        known = set(map(id, self._trainable))
        new = [path(v) for v in self._model.trainable_variables if id(v) not in known]
        if new:
            raise ValueError(
                f"{', '.join(new)} was not trained when fit() started, and LocalVote has no part of it: build and "
                "unfreeze all layers before fit()"
            )

    def _displacement(self, start: Array, variable: Any) -> Array:
        """Return what this worker votes with (L1)."""
        delta = widened(start) - widened(variable.numpy())
        sent = self._adversary(delta) if self._adversary else delta
        values = np.asarray(np.zeros_like(delta) if sent is None else sent, delta.dtype)
        self._vote.add(nonfinite=np.count_nonzero(~np.isfinite(values)))
        return core.finite(values)

    def _means(self, ends: Sequence[Array], moved: npt.NDArray[np.bool_]) -> dict[int, Array]:
        """Return by number the means of the buffers that anyone moved, each of those workers that did."""
        chosen = np.flatnonzero(moved.any(axis=0)).tolist()
        if not chosen:
            return {}
        everyone, means = self._exchange.gather_arrays([ends[k] for k in chosen]), {}
        for place, k in enumerate(chosen):
            rows = [np.asarray(everyone[worker][place], np.float64) for worker in np.flatnonzero(moved[:, k])]
            means[k] = np.asarray(np.mean(rows, axis=0)).astype(ends[k].dtype)
        return means

    def _commit(self, verdicts: dict[int, Array], magnitudes: Array, means: dict[int, Array]) -> None:
        """Move all variables, those that nobody moved to where they were (L4)."""
        start, momenta = list(self._start), list(self.momenta)
        for k, verdict in verdicts.items():
            x, u = start[k], momenta[k] if momenta else 0.0
            new, u = core.outer_update(widened(x), u, magnitudes[k] * verdict.reshape(x.shape), *self._outer)
            start[k] = new.astype(x.dtype)
            if momenta:
                momenta[k] = u
        self._write(start, [means.get(k, kept) for k, kept in enumerate(self._kept)])
        self.momenta, self.t = momenta, self.t + bool(verdicts)

    def _write(self, start: Sequence[Array], kept: Sequence[Array]) -> None:
        """Set all variables, and remember their values as those of a round's beginning."""
        for variable, value in zip([*self._trainable, *self._buffers], [*start, *kept], strict=True):
            variable.assign(value)
        self._start, self._kept = list(start), list(kept)

    def _digest(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(digest(self._start), np.uint8)

    def _read(self) -> None:
        self._start = [v.numpy() for v in self._trainable]
        self._kept = [v.numpy() for v in self._buffers]


def _moved(kept: Array, end: Array) -> bool:
    """Tell whether a buffer changed, to numbers that are all finite."""
    return bool((kept != end).any() and np.isfinite(np.asarray(end, np.float64)).all())
