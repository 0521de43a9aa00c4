"""Signum: a torch optimizer by itself, and the voter of its rank where a majority vote is enabled."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

import signsgd_core as core
from signsgd_core import WarmupSteps, Zeros

from . import kernels, polar, settings, sharding
from ._compat import called_by_torch
from .checkpoint import loading
from .memory import check_memory
from .state import any_private
from .views import FlatView
from .vote import StepInput, Vote


class Signum(Optimizer):
    r"""Train by sign momentum: signSGD, Signum, Lion, SignMuon, or signSGD with verdict momentum, by its settings.

    .. math::
        c_i = β_1 m_i + (1-β_1) g_i, \quad m_i ← β_2 m_i + (1-β_2) g_i, \\
        V = \mathrm{majority}_i(\mathrm{sign}\, c_i), \quad u ← γ u + (1-γ) V, \quad x ← x - lr (u + λ x)

    and with ``orthogonalize=True``, for matrices

    .. math::
        c_i ← \mathrm{polar}(c_i), \quad x ← x - lr (u / \sqrt{\mathrm{fan\_in}} + λ x)

    | setting | is |
    |---|---|
    | ``betas=(0, 0)`` | signSGD |
    | ``betas=(β, β)``, the default | Signum |
    | ``β1 ≠ β2``, e.g. ``(0.9, 0.99)`` | Lion |
    | ``betas=(0, 0), verdict_momentum=0.8`` | voted signSGD with verdict momentum |
    | ``orthogonalize=True, betas=(0.9, 0.95)`` | SignMuon, for hidden matrices; `signmuon_groups` makes the groups |

    By itself it is a worker whose verdict is its own ballot. Under `enable_majority_vote` or `MajorityVoteStrategy`
    every rank votes at `step`, so all that happens between ``backward()`` and ``step()`` (accumulation, clipping,
    gradient hooks) concerns the rank's own gradient. Under a gradient scaler that is scaled until `step`. A gradient
    entry that is NaN, ±Inf or beyond float32's range counts as 0; a parameter whose ``grad`` is None abstains on this
    rank, and stays untouched if it is None on all.

    The momenta are float32 whatever the parameter's dtype (`momentum_dtype` halves the worker's own), and exist only
    where a setting needs them:
    ``state[p]["momentum"]`` if β1 > 0, ``state[p]["verdict_momentum"]`` if γ > 0. The number of steps taken is
    ``group["step"]``.

    Args:
        params: parameters or parameter groups, real floating point, dense gradients.
        lr: learning rate, 0 or more; a float or a tensor of one element. First try a fifth of the rate that AdamW has,
            or with `verdict_momentum` twice that rate.
        betas: (β1, β2), each in [0, 1).
        weight_decay: λ, 0 or more, decoupled.
        verdict_momentum: γ in [0, 1); measured best at 0.8 or below, and with betas of 0.
        zeros: what exact zeros and ties count as: "alternate" (default with several workers), "abstain" (default with
            one) or "positive"; see `signsgd_core.zero_bit`. The same in all groups.
        warmup_steps: for how many first steps the ballot is the sign of the gradient while the momentum accumulates;
            "auto" is C(β2) of `signsgd_core.warmup_steps`.
        maximize: go up instead of down.
        momentum_dtype: torch.bfloat16 keeps ``state[p]["momentum"]`` in 2 bytes a parameter instead of 4. Steps 2 and 3
            are computed in float32 all the same, the ballot from the direction as computed, and the momentum is
            rounded once, to the nearest, ties to even. None is float32. The verdict momentum is always float32.
        orthogonalize: vote by the signs of the direction's polar factor, near ``U·Vᵀ`` of its singular value
            decomposition. Parameters have two to four dimensions, of which the first has the rows.
        ns_steps: iterations of Newton–Schulz, as in `torch.optim.Muon`.
        ns_coefficients: of each iteration.
        matrices: how many matrices each parameter of the group holds, one below the other, as `torch.chunk` cuts them:
            3 for a fused projection of queries, keys and values.

    Raises:
        ValueError: if a setting is outside its range, a parameter is complex, or one that is to be orthogonalized is no
            matrix.
        RuntimeError: at `step`, if a gradient is sparse.

    Source: arXiv 1802.04434 (Signum, warmup), 1810.05291 (majority vote), 2302.06675 (Lion), 2605.16311 (SignMuon).

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = Signum(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _step_supports_amp_scaling = True
    """Tells a gradient scaler to leave unscaling and overflows to `step`, so that no rank skips a vote alone."""

    vote: Vote | None
    """How this rank's ballots meet the others'; None where it is the only worker."""

    lost_vote: bool
    """Whether this is a copy of an optimizer that voted, without its vote."""

    restored_apart: bool
    """Whether each worker's momentum is saved and loaded apart from `state_dict`, which then does not say whose it is.
    """

    has_mean: bool
    """Whether it has the mean of the momenta of several workers, since its state was handed out before it votes."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.9),
        weight_decay: float = 0.0,
        *,
        verdict_momentum: float = 0.0,
        zeros: Zeros | None = None,
        warmup_steps: WarmupSteps = 0,
        maximize: bool = False,
        momentum_dtype: torch.dtype | None = None,
        orthogonalize: bool = False,
        ns_steps: int = core.NS_STEPS,
        ns_coefficients: tuple[float, float, float] = core.NS_COEFFICIENTS,
        matrices: int = 1,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": core.check_betas(betas),
            "weight_decay": weight_decay,
            "verdict_momentum": verdict_momentum,
            "zeros": zeros,
            "warmup_steps": warmup_steps,
            "maximize": maximize,
            "momentum_dtype": momentum_dtype,
            "orthogonalize": orthogonalize,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "matrices": matrices,
            "step": 0,
        }
        settings.check(defaults)
        # No attributes of the class: a wrapper that looks like one of its instances would find those before its own.
        self.vote, self.lost_vote, self.restored_apart, self.has_mean = None, False, False, False
        self._saved_by: tuple[int, int] | None = None
        self._checked: list[dict[str, Any]] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with settings of its own where it names them.

        Raises:
            ValueError: if a setting is outside its range, `zeros` differs from the other groups', or a parameter is
                complex; then the optimizer is as before.
            TypeError: if a parameter has no memory of its own, as a sharded one; likewise.
        """
        if isinstance(param_group, dict):  # else torch says what is wrong
            if "betas" in param_group:
                param_group["betas"] = core.check_betas(param_group["betas"])
            given = {**self.defaults, **param_group}
            settings.check(given)
            zeros, others = given["zeros"], {group["zeros"] for group in self.param_groups}
            if others - {zeros}:
                raise ValueError(
                    f"zeros must be the same in all parameter groups, got {zeros!r} beside {others.pop()!r}"
                )
        super().add_param_group(param_group)
        try:
            settings.check_matrices(self.param_groups[-1], len(self.param_groups) - 1)
            for k, p in enumerate(self.param_groups[-1]["params"]):
                if not p.is_floating_point() or p.dtype.itemsize < 2:
                    size = " of 2 bytes or more" if p.is_floating_point() else ""
                    raise ValueError(f"parameters must be real floating point{size}, got {p.dtype}")
                sharding.check_parameter(p, f"parameter {k} of group {len(self.param_groups) - 1}")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._checked.append(settings.checked(self.param_groups[-1]))
        if self.vote is not None:
            self.vote.verify_next()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: the worker's momentum, its ballots, the exchange, the verdict, the update.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: if a gradient is sparse; under a vote, if a rank was lost or the ranks disagree about the
                model or the settings.
        """
        if self._is_dummy_step():
            self._create_state()
            return None
        if self.lost_vote and self.vote is None:
            raise RuntimeError(
                "this is a copy of an optimizer that votes and would step alone: pass it to enable_majority_vote, or "
                "load its state_dict() into a new Signum"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        loading.drop_others(self.param_groups[0])
        try:
            self._check_groups()
            given = self.step_input()
            if self.vote is None:
                self._step_alone([view for view in given.views if view.present])
            else:
                self.vote.step(given)
        except BaseException:
            self._forget_scaler()
            raise
        for group in self.param_groups:
            group["step"] += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank; under a vote it says whose momentum it has."""
        state: dict[str, Any] = super().state_dict()
        return state if self._worker is None else loading.sign(state, self._worker)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; momenta come back bit for bit, in the dtype that they were saved in.

        Raises:
            ValueError: if it is another optimizer's; then nothing was loaded.
        """
        inner = find_signum(self)
        if inner is not self:  # a wrapper that looks like one: torch would set the state of the wrapper
            inner.load_state_dict(state_dict)
            return
        loading.check(state_dict)
        loading.warn_of_others(state_dict)
        state_dict, self._saved_by = loading.unsign(state_dict)
        with loading.uncast(self):
            super().load_state_dict(state_dict)
        self.has_mean = False
        if self.vote is not None:
            self.vote.verify_next()
        self.warn_of_lost()

    def warn_of_lost(self) -> None:
        """Say so, once a vote is enabled, where the momentum that was loaded is another worker's."""
        if self._worker is not None:
            cut = any(sharding.sharded(group["params"]) for group in self.param_groups)
            loading.warn_of_lost(self._saved_by, self._worker, sharded=cut)
            self._saved_by = None

    @property
    def _worker(self) -> tuple[int, int] | None:
        """The number of this worker and how many there are, where each has a momentum of its own; else None.

        Workers that come and go have no numbers to keep.
        """
        vote = self.vote
        if vote is None or vote.topology.changes or self.restored_apart or not any_private(self.param_groups):
            return None
        return vote.topology.workers.rank, vote.topology.workers.world_size

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along: not the process group, but that there was one."""
        return {**super().__getstate__(), "lost_vote": self.vote is not None or self.lost_vote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` returned."""
        super().__setstate__(state)
        lacking: dict[str, Any] = {
            "vote": None,
            "lost_vote": False,
            "restored_apart": False,
            "has_mean": False,
            "_saved_by": None,
            "_checked": [],
        }
        for name, value in lacking.items():
            self.__dict__.setdefault(name, value)
        for group in self.param_groups:
            group.update({**settings.LATER, **group})

    @property
    def t(self) -> int:
        """How many steps were taken; a group that was added midway counts its own."""
        return int(self.param_groups[0]["step"])

    @property
    def zeros(self) -> Zeros:
        """The zero rule in force."""
        return self._zeros_under(self.vote)

    def _zeros_under(self, vote: Vote | None) -> Zeros:
        chosen: Zeros | None = self.param_groups[0]["zeros"]
        return chosen or (core.default_zeros(1) if vote is None else vote.topology.zeros)

    def step_input(self) -> StepInput:
        """Return what a step taken now is about."""
        return StepInput(self.views(), self.settings_in_words(), self.zeros, self.t)

    def settings_in_words(self, without: Collection[str] = (), vote: Vote | None = None) -> list[str]:
        """Return what all ranks must have in common for a vote.

        Args:
            without: settings that may differ.
            vote: that is to come; None for the one that there is.
        """
        names = [name for name in self.defaults if name not in without]
        return [f"zeros={self._zeros_under(vote or self.vote)!r}", *settings.in_words(self.param_groups, names)]

    def unscale_at_step(self, does: bool) -> None:
        """Set whether `step` takes a gradient scaler's factor out, which it does at first; scalers and Lightning ask.

        Args:
            does: False where there is no scaler, so that Lightning clips the gradients.
        """
        self._step_supports_amp_scaling = does

    def views(self) -> list[FlatView]:
        """Return all parameters in the order of the groups, as flat views."""
        scale = getattr(self, "grad_scale", None)  # set by a gradient scaler for the time of this step
        inverse_scale = None if scale is None else scale.reciprocal()
        views: list[FlatView] = []
        for group in self.param_groups:
            for p in group["params"]:
                sharding.check_parameter(p, f"parameter {len(views)}")
                if p.grad is not None:
                    _check_gradient(p.grad, p, len(views))
                views.append(sharding.view(p, group, self.state, inverse_scale))
        return views

    def _check_groups(self) -> None:
        """Make sure that settings that were changed since the last step are in their range.

        Raises:
            ValueError: if one is not, or a schedule made a momentum of none.
        """
        now = [settings.checked(group) for group in self.param_groups]
        if now == self._checked:
            return
        for k, group in enumerate(self.param_groups):
            settings.check_change(self._checked[k] if k < len(self._checked) else group, group)
            settings.check_matrices(group, k)
        self._checked = now

    def _forget_scaler(self) -> None:
        """Remove what a gradient scaler set for the time of a step: torch does so only after one that returns."""
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)

    def _is_dummy_step(self) -> bool:
        """Whether torch only wants the state to be there: it steps with zeros for gradients and for every lr."""
        dummy = not self.state and all(float(group["lr"]) == 0 for group in self.param_groups)
        return dummy and called_by_torch("_init_optim_state")

    def _create_state(self) -> None:
        """Create the momenta that the settings need, as zeros."""
        for view in self.views():
            if view.present:
                view.create_state()

    def _step_alone(self, views: Iterable[FlatView]) -> None:
        by_kernel: dict[kernels.Kernel, list[FlatView]] = {}
        for view in views:
            by_kernel.setdefault(kernels.for_device(view.parameter.device), []).append(view)
        for kernel, own in by_kernel.items():
            polar.orthogonalize(own, range(len(own)))
            kernel.alone(own, self.zeros, self.t)
            for view in own:
                if view.owner is not None:  # of an empty shard, too
                    view.create_state()
                view.finish()


LOCAL_STEPS = "_signsgd_local_steps"
"""Where an optimizer of any kind has its local steps, as `local_steps.rounds` sets them; copies of it have none."""


def see_through(optimizer: Any) -> Any:
    """Return the innermost of the optimizers that wrappers hold in `optimizer`; itself where it wraps none."""
    seen = list[object]()
    while hasattr(optimizer, "optimizer") and not any(optimizer is one for one in seen):
        seen.append(optimizer)
        optimizer = optimizer.optimizer
    return optimizer


def find_signum(optimizer: object, number: int = 0) -> Signum:
    """Return the `Signum` that wrappers hold in `optimizer`, as Lightning's, Fabric's and Accelerate's do.

    Args:
        optimizer: itself, or wrapped however often.
        number: of the optimizer, for the error.

    Raises:
        TypeError: if it is another optimizer, or a wrapper that cannot be seen through.
    """
    inner = see_through(optimizer)
    kind = type(inner).__name__
    if not isinstance(inner, Signum):
        raise TypeError(
            f"a majority vote needs signsgd_lightning.Signum, optimizer {number} is {kind}: replace it, or train with "
            "plain DDP (in Lightning: strategy='ddp')"
        )
    if "param_groups" not in vars(inner):
        raise TypeError(
            f"optimizer {number} is a {kind} that looks like a Signum and holds one where it cannot be found: pass the "
            "Signum itself, or give the wrapper an attribute `optimizer` that returns it"
        )
    return inner


def _check_gradient(gradient: Tensor, parameter: Tensor, number: int) -> None:
    if gradient.shape != parameter.shape:
        raise RuntimeError(
            f"the gradient of parameter {number} must have its shape {tuple(parameter.shape)}, got "
            f"{tuple(gradient.shape)}: call zero_grad() after a parameter got other data"
        )
    if sharding.is_sharded(gradient) != sharding.is_sharded(parameter):
        raise TypeError(
            f"parameter {number} is a {type(parameter).__name__} and its gradient a {type(gradient).__name__}: give it "
            "the gradient that a backward pass leaves"
        )
    check_memory(sharding.local(gradient), f"the gradient of parameter {number}")
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            "Signum does not support sparse gradients: a coordinate without an entry would still have to vote. Build "
            "the embedding with sparse=False."
        )
