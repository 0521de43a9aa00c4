"""M workers in one process, step by step: the executable specification that judges every kernel and front end.

Written to be read beside the algorithm's eight steps. It counts plain numbers, never packed bits, so that it can
judge the code that does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .adversaries import Adversary, check_adversaries, check_lie
from .ballots import Zeros, default_zeros, zero_bit
from .polar import NS_COEFFICIENTS, NS_STEPS, matrices, polar
from .settings import WarmupSteps, check_count, check_newton_schulz, check_settings, check_warmup_steps
from .update import (
    direction,
    finite,
    update_momentum,
    update_parameters,
    update_verdict_momentum,
)

Array = npt.NDArray[Any]


class Reference:
    """Train one model on M simulated workers with steps 1-8 of the algorithm.

    Args:
        parameters: the tensors `x`, floating point; copied.
        workers: M, at least 1.
        lr: learning rate; may be changed between steps.
        betas: (β1, β2).
        weight_decay: λ.
        verdict_momentum: γ.
        zeros: the zero rule; "abstain" with one worker and "alternate" with more where left out.
        warmup_steps: for how many first steps the ballot is the sign of the gradient.
        adversaries: worker -> what it sends instead of its gradient.
        orthogonalize: tensor's number -> how many matrices it holds; their polar factors cast the ballots.
        ns_steps: Newton–Schulz iterations.
        ns_coefficients: of each.
        tolerance: a worker's ballot is undecided where its polar factor is within so much of 0, in units of the
            matrix's root mean square: rounding decides it, and front ends may differ.

    Attributes:
        parameters: the tensors after the last step, the same on all workers.
        momenta: ``momenta[i][k]``, worker `i`'s momentum of tensor `k`, float32.
        verdict_momenta: ``u`` of each tensor, float32.
        verdicts: ``V`` of each tensor at the last step, `None` where nobody had a gradient.
        undecided: of each tensor, where undecided ballots could have turned the verdict at any step until now.
        t: how many steps were taken.

    Raises:
        ValueError: if a setting is outside its range.

    Example:
        >>> reference = Reference([np.zeros(2)], workers=3, lr=0.5, betas=(0, 0))
        >>> reference.step([[np.array([1.0, -1.0])], [np.array([1.0, 2.0])], [np.array([-1.0, 3.0])]])
        >>> reference.parameters[0]
        array([-0.5, -0.5])
    """

    def __init__(
        self,
        parameters: Sequence[Array],
        workers: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.9),
        weight_decay: float = 0.0,
        verdict_momentum: float = 0.0,
        zeros: Zeros | None = None,
        warmup_steps: WarmupSteps = 0,
        adversaries: Mapping[int, Adversary] | None = None,
        orthogonalize: Mapping[int, int] | None = None,
        ns_steps: int = NS_STEPS,
        ns_coefficients: Sequence[float] = NS_COEFFICIENTS,
        tolerance: float = 0.0,
    ) -> None:
        check_count("workers", workers, 1)
        check_settings(lr, betas, weight_decay, verdict_momentum, zeros, warmup_steps)
        self.parameters = [np.array(x) for x in parameters]
        if any(x.dtype.kind != "f" and x.dtype.name != "bfloat16" for x in self.parameters):
            raise ValueError(f"parameters must be floating point, got {[str(x.dtype) for x in self.parameters]}")
        check_newton_schulz(ns_steps, ns_coefficients)
        if not isinstance(orthogonalize, Mapping | None) or set(orthogonalize or ()) - set(range(len(self.parameters))):
            raise ValueError(
                f"orthogonalize must map numbers of the {len(self.parameters)} tensors to how many matrices each "
                f"holds, such as {{0: 1}}, got {orthogonalize!r}"
            )
        self.orthogonalize = dict(orthogonalize or {})
        shapes = {k: (self.parameters[k].shape, count) for k, count in self.orthogonalize.items()}
        self.scales = {k: matrices(*shape, f"tensor {k}").scale for k, shape in shapes.items()}
        self.ns_steps, self.ns_coefficients, self.tolerance = ns_steps, tuple(ns_coefficients), tolerance
        check_adversaries(adversaries, workers)
        self.adversaries = dict(adversaries or {})
        self.workers, self.lr, self.betas, self.weight_decay = workers, lr, betas, weight_decay
        self.gamma = verdict_momentum
        self.warmup_steps = check_warmup_steps(warmup_steps, betas[1])
        self.zeros: Zeros = zeros if zeros is not None else default_zeros(workers)
        self.momenta = [[np.zeros(x.shape, np.float32) for x in self.parameters] for _ in range(workers)]
        self.verdict_momenta = [np.zeros(x.shape, np.float32) for x in self.parameters]
        self.verdicts: list[Array | None] = [None] * len(self.parameters)
        self.undecided = [np.zeros(x.shape, bool) for x in self.parameters]
        self.t = 0

    def step(self, gradients: Sequence[Sequence[Array | None]]) -> None:
        """Take one step.

        Args:
            gradients: ``gradients[i][k]``, worker `i`'s own gradient of tensor `k`; `None` abstains there.

        Raises:
            ValueError: if they are not one a worker and tensor, each of the tensor's shape.
        """
        self.check_tensors(gradients)
        for k, x in enumerate(self.parameters):
            directions = [self._direction(i, k, gradients[i][k]) for i in range(self.workers)]
            cast = {i: c for i, c in enumerate(directions) if c is not None}
            verdict = self.verdicts[k] = self._verdict([self._ballot(i, c) for i, c in cast.items()]) if cast else None
            if verdict is None:
                continue  # nobody had a gradient: the tensor stays as it is
            u = update_verdict_momentum(self.verdict_momenta[k], verdict, self.gamma)  # step 7
            self.verdict_momenta[k] = u
            if k in self.orthogonalize:
                self.undecided[k] |= self._hangs(k, cast)
                u = self.scales[k] * u  # the root mean square of an orthogonal update
            moved = update_parameters(x, u.astype(x.dtype), self.lr, self.weight_decay)  # step 8
            self.parameters[k] = moved.astype(x.dtype)
        self.t += 1

    def _direction(self, i: int, k: int, gradient: Array | None) -> Array | None:
        """Steps 1-3 and 2b: what worker `i` votes with on tensor `k`, or `None` if it has no gradient."""
        if gradient is not None and i in self.adversaries:
            gradient = self.adversaries[i](gradient)
            if gradient is not None:
                check_lie(gradient, self.parameters[k].shape)
        if gradient is None:
            return None
        beta1, beta2 = self.betas
        m = self.momenta[i][k]
        with np.errstate(over="ignore"):
            g = finite(np.asarray(gradient, np.float32))  # step 1; what float32 cannot hold is not finite either
        c = direction(m, g, beta1) if self.t >= self.warmup_steps else g  # step 2
        self.momenta[i][k] = update_momentum(m, g, beta2)  # step 3
        if k not in self.orthogonalize:
            return c
        return polar(c, self.ns_steps, self.ns_coefficients, self.orthogonalize[k])  # step 2b

    def _ballot(self, i: int, c: Array) -> Array:
        """Step 4: worker `i`'s ballot as −1, 0, +1."""
        return np.where(c == 0, self._zero(i), np.sign(c))

    def _verdict(self, ballots: Sequence[Array]) -> Array:
        """Steps 5 and 6: `V` from the ballots of those who have one."""
        stacked = np.stack(ballots)
        negative, positive = (stacked < 0).sum(axis=0), (stacked > 0).sum(axis=0)  # step 5
        verdict = np.where(negative > positive, -1, 1)
        return np.where(negative == positive, self._zero(0), verdict).astype(np.float32)  # step 6

    def _hangs(self, k: int, cast: Mapping[int, Array]) -> Array:
        """Tell where undecided ballots could turn the verdict on tensor `k`."""
        near = {i: self._near_zero(k, c) for i, c in cast.items()}
        sides = [
            self._verdict([np.where(near[i], side, self._ballot(i, c)) for i, c in cast.items()]) for side in (-1, 1)
        ]
        voted = self.verdicts[k]
        return np.asarray((sides[0] != voted) | (sides[1] != voted))

    def _near_zero(self, k: int, c: Array) -> Array:
        """Tell where rounding decides the sign of a polar factor; rows and columns of zeros are zeros everywhere."""
        x = c.reshape(matrices(c.shape, self.orthogonalize[k]))
        if not x.size:
            return np.zeros(c.shape, bool)
        near = np.abs(x) < self.tolerance * np.sqrt((x * x).mean((1, 2), keepdims=True))
        exact = (x == 0).all(1, keepdims=True) | (x == 0).all(2, keepdims=True)
        return np.asarray(near & ~exact).reshape(c.shape)

    def _zero(self, worker: int) -> int:
        """Return −1, 0 or +1: what a zero of `worker`, or with 0 a tie, counts as."""
        bit = zero_bit(self.zeros, self.t, worker)
        return 0 if bit is None else 1 - 2 * bit

    def check_tensors(self, given: Sequence[Sequence[Array | None]], kind: str = "gradient") -> None:
        """Make sure that something is given of each worker and tensor, of its shape.

        Args:
            given: ``given[i][k]``, of worker `i` and tensor `k`.
            kind: what it is.

        Raises:
            ValueError: if not.
        """
        if len(given) != self.workers:
            raise ValueError(f"{kind}s must be those of {self.workers} workers, got {len(given)}")
        for i, worker in enumerate(given):
            if len(worker) != len(self.parameters):
                raise ValueError(f"worker {i} must have {len(self.parameters)} {kind}s, got {len(worker)}")
            for k, (one, x) in enumerate(zip(worker, self.parameters, strict=True)):
                if one is not None and np.shape(one) != x.shape:
                    raise ValueError(f"worker {i}'s {kind} {k} must have the shape {x.shape}, got {np.shape(one)}")
