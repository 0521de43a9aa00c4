"""Local steps: every worker takes `H` steps of its own, then all vote on where they went (L1-L4).

| | name | formula |
|---|---|---|
| L1 | displacement | ``Δ_i = x_0 − x_i``; an entry that is NaN or ±Inf counts as 0 |
| L2 | ballot, magnitude | ``sign(Δ_i)``; ``s_i[k] = mean |Δ_i[k]|``, one number a tensor |
| L3 | verdict, magnitude | `V` of the ballots as at any vote (steps 5 and 6); ``s[k] = median_i s_i[k]`` |
| L4 | outer update | ``u ← μ·u + s·V``, ``x ← x_0 − η·(s·V + μ·u)``, ``x_0 ← x`` |

The outer update is that of `torch.optim.SGD` with Nesterov's momentum, `s·V` in the gradient's place. A worker that did
not move a tensor abstains there, in ballot and magnitude alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .adversaries import Adversary, check_adversaries, check_lie
from .ballots import Zeros
from .reference import Reference
from .settings import check_count, check_share, check_size
from .update import finite

Array = Any
"""An array of any framework that has arithmetic operators."""


def check_local_steps(sync_every: Any, outer_lr: Any, outer_momentum: Any) -> None:
    """Make sure that the settings of local steps are in their range.

    Raises:
        ValueError: for the first that is not, with its name, its value and what it may be.

    Example:
        >>> check_local_steps(0, 1.0, 0.0)
        Traceback (most recent call last):
        ValueError: sync_every must be a whole number of 1 or more, got 0
    """
    check_count("sync_every", sync_every, 1)
    check_size("outer_lr", outer_lr)
    check_share("outer_momentum", outer_momentum)


def magnitude(displacement: npt.NDArray[Any]) -> np.float32:
    """Return a tensor's magnitude, the mean of its displacement's absolute values (L2); 0 for an empty one.

    Example:
        >>> magnitude(np.array([3.0, -1.0]))
        np.float32(2.0)
    """
    return np.float32(np.abs(displacement).mean(dtype=np.float64) if displacement.size else 0.0)


def median_magnitudes(magnitudes: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the median of the workers' magnitudes, for each tensor (L3).

    One that is not finite or not above 0 is an abstention. With an even number it is the mean of the middle two.

    Args:
        magnitudes: shape (workers, tensors).

    Returns:
        Shape (tensors,); 0 where all abstain.

    Example:
        >>> median_magnitudes(np.array([[1.0, 0.0], [2.0, 0.0], [np.inf, np.nan], [9.0, -1.0]]))
        array([2., 0.], dtype=float32)
    """
    rows = np.asarray(magnitudes, np.float64)
    counted = np.isfinite(rows) & (rows > 0)
    columns = zip(rows.T, counted.T, strict=True)
    return np.array([np.median(row[there]) if there.any() else 0.0 for row, there in columns], np.float32)


def outer_update(x: Array, u: Array, step: Array, outer_lr: float, outer_momentum: float) -> tuple[Array, Array]:
    """Return parameters and outer momentum after a round, ``u ← μ·u + s·V``, ``x ← x_0 − η·(s·V + μ·u)`` (L4).

    Args:
        x: `x_0`, any shape.
        u: outer momentum, the same shape.
        step: `s·V`, the same shape.
        outer_lr: η.
        outer_momentum: μ; with 0, `u` is not used.

    Returns:
        `x` and `u`.

    Example:
        >>> outer_update(1.0, 0.5, -0.25, outer_lr=2.0, outer_momentum=0.5)
        (1.5, 0.0)
    """
    if outer_momentum == 0:
        return x - outer_lr * step, u
    u = outer_momentum * u + step
    return x - outer_lr * (step + outer_momentum * u), u


class LocalReference:
    """Close rounds of local steps on M simulated workers: L1-L4, as front ends must.

    Args:
        parameters: the tensors `x_0`, floating point; copied.
        workers: M, at least 1.
        outer_lr: η.
        outer_momentum: μ.
        zeros: the zero rule; as `Reference` where left out.
        adversaries: worker -> what it sends instead of its displacement.

    Attributes:
        parameters: `x_0`, the same on all workers.
        momenta: ``u`` of each tensor, float32.
        verdicts: ``V`` of each tensor in the last round, `None` where nobody moved it.
        magnitudes: ``s`` of each tensor in the last round.

    Raises:
        ValueError: if a setting is outside its range.

    Example:
        >>> reference = LocalReference([np.zeros(2)], workers=3)
        >>> reference.close([[np.array([1.0, 3.0])], [np.array([2.0, -2.0])], [np.array([-1.0, 1.0])]])
        >>> reference.parameters[0]
        array([2., 2.])
    """

    def __init__(
        self,
        parameters: Sequence[npt.NDArray[Any]],
        workers: int,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        zeros: Zeros | None = None,
        adversaries: Mapping[int, Adversary] | None = None,
    ) -> None:
        check_local_steps(1, outer_lr, outer_momentum)
        self._vote = Reference(parameters, workers, lr=0.0, betas=(0, 0), zeros=zeros)
        self.parameters = self._vote.parameters  # a learning rate of 0 leaves them to L4
        check_adversaries(adversaries, workers)
        self.outer_lr, self.outer_momentum, self.adversaries = outer_lr, outer_momentum, dict(adversaries or {})
        self.momenta = [np.zeros(x.shape, np.float32) for x in self.parameters]
        self.magnitudes = np.zeros(len(self.parameters), np.float32)

    @property
    def verdicts(self) -> list[npt.NDArray[Any] | None]:
        """`V` of each tensor in the last round, `None` where nobody moved it."""
        return self._vote.verdicts

    def close(self, moved: Sequence[Sequence[npt.NDArray[Any]]]) -> None:
        """Close a round; one in which nobody moved is none.

        Args:
            moved: ``moved[i][k]``, tensor `k` after worker `i`'s steps.

        Raises:
            ValueError: if they are not one a worker and tensor, each of the tensor's shape; nor may a lie have another.
        """
        self._vote.check_tensors(moved, "tensor")
        cast = [[self._displacement(i, k, x) for k, x in enumerate(tensors)] for i, tensors in enumerate(moved)]
        s_i = np.array([[magnitude(delta) for delta in of_worker] for of_worker in cast])  # L2
        if not s_i.any():
            return
        self._vote.step(
            [[d if s else None for d, s in zip(*pair, strict=True)] for pair in zip(cast, s_i, strict=True)]
        )
        self.magnitudes = median_magnitudes(s_i)  # L3
        for k, (x, verdict) in enumerate(zip(self.parameters, self.verdicts, strict=True)):
            if verdict is None:
                continue  # nobody moved it, and its momentum rests
            step = self.magnitudes[k] * verdict
            new, self.momenta[k] = outer_update(widened(x), self.momenta[k], step, self.outer_lr, self.outer_momentum)
            self.parameters[k] = new.astype(x.dtype)

    def _displacement(self, i: int, k: int, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """L1: what worker `i` votes with on tensor `k`."""
        delta = widened(self.parameters[k]) - widened(np.asarray(x))
        if i not in self.adversaries or not delta.any():
            return finite(delta)
        sent = self.adversaries[i](delta)
        if sent is None:
            return np.zeros_like(delta)
        check_lie(sent, delta.shape)
        return finite(np.asarray(sent))


def widened(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array in float32, or float64 if it is that; half types round once, at the end."""
    return x.astype(np.promote_types(x.dtype, np.float32))
