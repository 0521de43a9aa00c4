"""What the experiments train by: optimizers that take the mean of all workers' gradients, and majority votes.

A name may end with `MEDIAN`, then `CLIPPED`, or with `PER_LAYER`. Muon and SignMuon divide a model alike, by
`signmuon_groups`.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from lion_pytorch import Lion
from torch import Tensor, nn

import signsgd_core as core
from signsgd_lightning import Signum, signmuon_groups

from .simulated_local import SimulatedLocalSteps
from .simulated_vote import SimulatedVote
from .tasks import GPT

AVERAGED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "AdamW .95": partial(torch.optim.AdamW, betas=(0.9, 0.95)),
    "Adam": torch.optim.Adam,
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "SGD, Nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Lion": Lion,
}
"""Without Muon, which is two optimizers."""
OF_MATRICES: dict[str, dict[str, Any]] = {
    "SignMuon, 3 steps": {"ns_steps": 3},
    "SignMuon, 4 steps": {"ns_steps": 4},
    "SignMuon, mixed": {"verdict_momentum": 0.5},
    "SignMuon, slow": {"betas": (0.95, 0.98)},
}
"""What forms of SignMuon change for matrices."""
VOTED: dict[str, dict[str, Any]] = {
    "signSGD": {"betas": (0.0, 0.0)},
    "Signum": {"betas": (0.9, 0.9)},
    "Signum .99": {"betas": (0.99, 0.99)},
    "voted Lion": {"betas": (0.9, 0.99)},
    **{
        f"verdict momentum {gamma}": {"betas": (0.0, 0.0), "verdict_momentum": gamma} for gamma in (0.5, 0.8, 0.9, 0.95)
    },
    **{f"mixture {beta} and 0.8": {"betas": (beta, beta), "verdict_momentum": 0.8} for beta in (0.5, 0.9)},
    "SignMuon": {},
    "SignMuon, verdict momentum": {},
    **{name: {} for name in OF_MATRICES},
}
"""SignMuon's settings are those of `signmuon_groups`; with verdict momentum that is for what is no matrix."""
CLIPPED = ", clipped"
"""At the end of a method that averages: the norm of the mean gradient is at most 1."""
MEDIAN = ", median"
"""Behind a method that averages: it takes the median of the workers, coordinate by coordinate, and not their mean."""
PER_LAYER = ", per layer"
"""At the end of a voted method: matrices have learning rates in the ratio of their weights' root mean squares."""


class Job(NamedTuple):
    """One training, of the task with that key.

    Attributes:
        other_lr: of what is no hidden matrix, for Muon and SignMuon.
        sync_every: steps of each worker's own between exchanges; None for an exchange at every step.
        exchange: of local steps, "vote" or "mean".
        outer_lr: of local steps.
        outer_momentum: of local steps.
        liars: workers that send the opposite of their gradients, the first ones; None for no such matter.
        replaced_every: steps after which a worker of a vote, each in turn, is replaced by one without momenta.
    """

    task: str
    method: str
    lr: float
    weight_decay: float = 0.0
    workers: int = 4
    steps: int = 500
    seed: int = 0
    other_lr: float | None = None
    sync_every: int | None = None
    exchange: str | None = None
    outer_lr: float | None = None
    outer_momentum: float | None = None
    liars: int | None = None
    replaced_every: int | None = None

    @property
    def key(self) -> str:
        """What it is stored under; what a job does not have is left out."""
        return json.dumps({name: value for name, value in self._asdict().items() if value is not None}, sort_keys=True)

    @property
    def bits(self) -> float:
        """Bits that a worker sends for each parameter in the whole run: both halves of a ring, or of a vote."""
        bits = 1 if self.exchange == "vote" or (voted(self.method) and self.exchange is None) else 32
        return 2 * (self.workers - 1) / self.workers * bits * self.steps / (self.sync_every or 1)


Update = Callable[[list[list[Tensor]], float], None]
"""Takes each worker's gradients, and the learning rate as a share of its peak."""


def voted(method: str) -> bool:
    """Return whether a method is a vote."""
    return method.removesuffix(PER_LAYER) in VOTED


def workers_of(model: nn.Module, job: Job) -> tuple[list[nn.Module], Update]:
    """Return the models that a job's workers compute their gradients on, and what moves them by these.

    They are one and the same, but for local steps.
    """
    if job.sync_every is None:
        return [model] * job.workers, update_by(model, job)
    inner = job._replace(workers=1)
    local = SimulatedLocalSteps(model, job, lambda one: update_by(one, inner))
    return local.models, local


def update_by(model: nn.Module, job: Job) -> Update:
    """Return what moves the model by the gradients of a job's workers."""
    return _voted(model, job) if voted(job.method) else _averaged(model, job)


def _averaged(model: nn.Module, job: Job) -> Update:
    parameters = list(model.parameters())
    step, robust = averaged_step(model, job), MEDIAN in job.method

    def update(gradients: list[list[Tensor]], share: float) -> None:
        for p, of_workers in zip(parameters, zip(*gradients, strict=True), strict=True):
            rows = torch.stack(of_workers)
            p.grad = rows.median(0).values if robust else rows.mean(0)
        step(share)

    return update


def averaged_step(model: nn.Module, job: Job) -> Callable[[float], None]:
    """Return what moves a model by the mean gradients that its parameters have, at a share of the learning rate."""
    optimizers, cuts = averaging_optimizers(model, job)
    scale = scaling(optimizers)

    def step(share: float) -> None:
        if job.method.endswith(CLIPPED):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        give_gradients(cuts)
        scale(share)
        for optimizer in optimizers:
            optimizer.step()

    return step


def scaling(optimizers: Sequence[torch.optim.Optimizer]) -> Callable[[float], None]:
    """Return what sets learning rates to a share of what they are now."""
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]

    def scale(share: float) -> None:
        for group, peak in peaks:
            group["lr"] = peak * share

    return scale


Cut = tuple[nn.Parameter, list[nn.Parameter]]
"""A parameter, and its matrices on the same memory."""


def averaging_optimizers(model: nn.Module, job: Job) -> tuple[list[torch.optim.Optimizer], list[Cut]]:
    """Return the optimizers of a method that averages, and which parameters they have as matrices."""
    method = job.method.removesuffix(CLIPPED).removesuffix(MEDIAN)
    if method == "Muon":
        return muon_optimizers(model, job, Muon)
    return [AVERAGED[method](model.parameters(), lr=job.lr, weight_decay=job.weight_decay)], []


def give_gradients(cuts: Sequence[Cut]) -> None:
    """Give matrices their parts of the parameters' gradients."""
    for p, matrices in cuts:
        assert p.grad is not None
        for matrix, gradient in zip(matrices, p.grad.view(len(matrices), *matrices[0].shape), strict=True):
            matrix.grad = gradient


class Muon(torch.optim.Muon):
    """Torch's Muon, on the CPU with polar factors in float32, as ours are there; torch's bfloat16 is slower there."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)  # type: ignore[no-untyped-call]
        with mock.patch.object(Tensor, "bfloat16", Tensor.float):
            return super().step(closure)  # type: ignore[no-untyped-call]


def muon_optimizers(
    model: nn.Module, job: Job, kind: type[torch.optim.Muon]
) -> tuple[list[torch.optim.Optimizer], list[Cut]]:
    """Return Muon for the hidden matrices and AdamW for the rest; kernels are matrices of `fan_in` columns."""
    cuts, rest = list[Cut](), list[nn.Parameter]()
    for group in hidden_groups(model, job):
        for _, p in group["params"]:
            if group.get("orthogonalize"):
                cuts.append((p, [nn.Parameter(m) for m in p.detach().view(core.matrices(p.shape, group["matrices"]))]))
            else:
                rest.append(p)
    hidden = [matrix for _, matrices in cuts for matrix in matrices]
    muon = kind(hidden, lr=job.lr, weight_decay=job.weight_decay)
    adamw = torch.optim.AdamW(rest, lr=job.other_lr or job.lr, betas=(0.9, 0.95), weight_decay=job.weight_decay)
    return [muon, adamw], cuts


def hidden_groups(model: nn.Module, job: Job) -> list[dict[str, Any]]:
    """Return SignMuon's groups; the GPT's output layer is its embedding, so that all its `Linear` are hidden."""
    output = None if isinstance(model, GPT) else "auto"
    return signmuon_groups(model, job.lr, job.other_lr or job.lr, output=output)


def voting_optimizer(model: nn.Module, job: Job) -> Signum:
    """Return the optimizer of a voted method; all but SignMuon have a group for each parameter."""
    method = job.method.removesuffix(PER_LAYER)
    groups: list[dict[str, Any]] = [{"params": [p]} for p in model.parameters()]
    if method.startswith("SignMuon"):
        groups = hidden_groups(model, job)
        groups = [group | OF_MATRICES.get(method, {}) if group.get("orthogonalize") else group for group in groups]
        if method == "SignMuon, verdict momentum":
            groups[-1] |= {"betas": (0.0, 0.0), "verdict_momentum": 0.8}
    return Signum(groups, job.lr, weight_decay=job.weight_decay, **VOTED[method])


def _voted(model: nn.Module, job: Job) -> Update:
    parameters = list(model.parameters())
    optimizer = voting_optimizer(model, job)
    vote, scale = SimulatedVote(optimizer, job.workers), scaling([optimizer])
    numbers = {p: k for k, p in enumerate(parameters)}
    order = [numbers[p] for group in optimizer.param_groups for p in group["params"]]

    def update(gradients: list[list[Tensor]], share: float) -> None:
        scale(share)
        if job.method.endswith(PER_LAYER):
            for group, rate in zip(optimizer.param_groups, layer_rates(parameters), strict=True):
                group["lr"] *= rate
        if job.replaced_every and optimizer.t and optimizer.t % job.replaced_every == 0:
            vote.replace(optimizer.t // job.replaced_every % job.workers)
        vote.step([[own[k] for k in order] for own in gradients])

    return update


def layer_rates(parameters: Sequence[Tensor]) -> list[float]:
    """Return each tensor's share of the learning rate: matrices' are as their weights to all matrices', vectors' 1."""
    matrices = [p.detach() for p in parameters if p.dim() > 1]
    everywhere = float(torch.cat([p.flatten() for p in matrices]).square().mean().sqrt())
    return [float(p.detach().square().mean().sqrt()) / everywhere if p.dim() > 1 else 1.0 for p in parameters]
