"""VerifyReplicas: are the replicas still the same, bit for bit? And a name for the one that is not."""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from signsgd_core.digests import DIGEST_BYTES, digest, first_difference

from . import internals
from .callbacks import voting_optimizer
from .optimizer import Signum

Digests = npt.NDArray[np.uint8]


class ReplicasDifferError(RuntimeError):
    """Variables or verdict momenta are not the same on all replicas.

    Attributes:
        replicas: those that differ from the most others.
        step: `t`, after which it was found.
        variable: the path of the first that differs.
    """

    def __init__(self, replicas: list[int], step: int, variable: str) -> None:
        who = f"replica {replicas[0]} differs" if len(replicas) == 1 else f"replicas {_words(replicas)} differ"
        super().__init__(
            f"after step {step} {who} from the other replicas in {variable}, or in its verdict momentum: memory failed "
            "there, or code changed variables on that replica alone. Restart all from the last checkpoint."
        )
        self.replicas, self.step, self.variable = replicas, step, variable


class VerifyReplicas(keras.callbacks.Callback):  # type: ignore[misc]
    """Make sure, once in so many optimizer steps, that all replicas hold the same bits.

    Of each variable that is voted on and of its verdict momentum every replica has 16 bytes compared, which between
    workers travel. On several workers all of them need this callback.

    Args:
        every_n_steps: how often, in steps of the optimizer: votes, where gradients are accumulated. With
            ``steps_per_execution`` Keras tells of its last step only, and it is looked at then.

    Raises:
        ValueError: if `every_n_steps` is no whole number of 1 or more.
        RuntimeError: at the start of `fit`, if no optimizer votes.
        ReplicasDifferError: at the end of a batch, on all workers, if the replicas differ.

    Example:
        >>> callbacks = [VerifyReplicas(every_n_steps=1000)]
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps must be a whole number of 1 or more, got {every_n_steps!r}")
        super().__init__()
        self.every_n_steps = every_n_steps

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find the optimizer."""
        self._optimizer = voting_optimizer(self.model, "VerifyReplicas has no replicas to compare")
        self._checks = self._steps() // self.every_n_steps

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Compare, where it is time."""
        steps = self._steps()
        if steps // self.every_n_steps != self._checks:
            self._checks = steps // self.every_n_steps
            verify(self._optimizer, steps - 1)

    def _steps(self) -> int:
        return int(self._optimizer.iterations.numpy())


def verify(optimizer: Signum, step: int) -> None:
    """Make sure that all replicas hold the same bits; all workers must call it.

    Args:
        optimizer: built.
        step: `t`, the number of the step just taken.

    Raises:
        ReplicasDifferError: if not, on all workers.
    """
    variables = optimizer._trainable_variables
    own = np.stack([_digests(optimizer, variable) for variable in variables], axis=1)
    whole = np.stack([np.frombuffer(digest([row]), np.uint8) for row in own])[:, None]
    if first_difference(_gather(optimizer, whole)) is None:
        return
    found = first_difference(_gather(optimizer, own))
    assert found is not None
    number, replicas = found
    raise ReplicasDifferError(replicas, step, variables[number].path)


def _digests(optimizer: Signum, variable: Any) -> Digests:
    """Return those of a variable with its verdict momentum, on each replica of this process: (replicas, bytes)."""
    average = optimizer.state_of(variable)[1]
    shared = [variable] if average is None else [variable, average]
    held = [optimizer._distribution_strategy.experimental_local_results(v.value) for v in shared]
    return np.stack(
        [np.frombuffer(digest(part.numpy() for part in parts), np.uint8) for parts in zip(*held, strict=True)]
    )


def _gather(optimizer: Signum, own: Digests) -> Digests:
    """Return the digests of the replicas of all workers, one replica's after the other's."""
    op = optimizer.voter.op.wrapped
    if not isinstance(op, internals.CollectiveAllReduce):
        return own
    everyone: npt.NDArray[np.int32] = internals.gather_now(op, np.ascontiguousarray(own).view(np.int32))
    return everyone.view(np.uint8).reshape(-1, own.shape[1], DIGEST_BYTES)


def _words(replicas: list[int]) -> str:
    return ", ".join(map(str, replicas[:-1])) + f" and {replicas[-1]}"
