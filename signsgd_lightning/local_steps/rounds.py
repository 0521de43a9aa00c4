"""Rounds: a displacement for a gradient, a vote on it, and the outer update (L1-L4)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import signsgd_core as core
from signsgd_core.adversaries import Adversary, check_lie

from .. import kernels
from ..optimizer import LOCAL_STEPS, see_through
from ..views import FlatView
from ..vote import RanksDifferError, StepInput, Vote, VoteOptions
from ..vote.agreement import Purpose
from ..vote.local_gradients import refuse_other_wrappers
from ..vote.topology import Flat
from ..vote.transport import Message
from ..vote.verification import verify
from ..vote.vote import Ballot
from .anchors import Anchors
from .buffers import Buffers
from .options import LocalStepOptions
from .outer import OuterStep
from .taking import Displaced, Once, Outcome, Taker

_EARLY, _MOVED = 1, 2
"""What the first number of a row of magnitudes is the sum of."""


class LocalSteps:
    """Rounds of local steps: steps of this rank's own, then a vote of all on where they went.

    A round begins, and `x_0` is taken down, with the first step after the last round. Nothing changes before all of a
    vote has arrived; where it fails parameters and floating-point buffers are again as they were when the round began.

    Args:
        model: its floating-point buffers are averaged.
        optimizers: whose parameters are voted on; the last one's steps are counted.
        options: of the rounds.
        ranks: those that vote.
        taker: takes a round; None takes it once.
        label: of the votes, the same on all ranks.

    Attributes:
        optimizers: as above.
        outer: what moves parameters when a round closes, and the number of rounds.
        vote: of all ranks.
        steps: of this rank since the last round.
        counted: all steps of this rank.
        drift: while somebody observes the vote, the sum of squares of what this rank's parameters differed by from the
            common ones at the ends of rounds, and of how many.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        options: LocalStepOptions,
        ranks: Flat,
        taker: Taker | None = None,
        label: str = "local steps",
    ) -> None:
        self.optimizers, self.options = list(optimizers), options
        self.steps, self.counted, self.drift = 0, 0, (0.0, 0)
        self._buffers, self._begun, self._moved = Buffers(model), False, False
        self._taker: Taker = taker or Once()
        self._displaced: Displaced | None = None
        self._anchors = Anchors(model, self.optimizers)
        self.outer = OuterStep(self._anchors, options)
        votes = VoteOptions(options.verify_every_n_rounds)
        self.vote = self.outer.optimizer.vote = Vote(ranks, self._anchors.names, label, votes)
        self.outer.find_parameters()
        self.vote.agree(self.outer.optimizer.views(), self.settings(), Purpose.ENABLE)
        self._handles = [optimizer.register_step_pre_hook(self.open) for optimizer in self.optimizers]
        self._handles.append(self.optimizers[-1].register_step_post_hook(self.count))
        self._allow_ddp = refuse_other_wrappers(model, _OWN_GRADIENTS)
        for optimizer in self.optimizers:
            setattr(optimizer, LOCAL_STEPS, self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def count(self, *_: Any) -> None:
        """Count a step of this rank; close the round if it was the `sync_every`-th.

        Raises:
            PeerLostError: as `close_round`, and what else that raises.
        """
        self.steps, self.counted = self.steps + 1, self.counted + 1
        if self.steps >= self.options.sync_every:
            self.close(early=False)

    def close_round(self) -> None:
        """Close the round now, however many steps it had; every rank must call it.

        Ranks may have taken different numbers of steps: one that is ahead waits, and takes part in the rounds of those
        that are not here yet.

        Raises:
            PeerLostError: if a rank does not answer within the process group's timeout.
            RuntimeError: if the ranks disagree.
            RanksDifferError: if they are no longer the same, where that is looked at.
        """
        while not self.close(early=True):
            pass

    def end(self) -> None:
        """Let the optimizers take steps without votes."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self.optimizers:
            vars(optimizer).pop(LOCAL_STEPS, None)
        self._allow_ddp()

    @property
    def is_open(self) -> bool:
        """Whether this rank took a step since the last round."""
        return self._begun

    def state_dict(self) -> dict[str, Any]:
        """Return what is the same on all ranks between rounds, beside the parameters: outer momenta and the count."""
        return self.outer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; settings stay as they are, and an open round ends without a vote.

        Raises:
            ValueError: if it is of another model; then nothing was loaded.
        """
        self.outer.load_state_dict(state)
        self.forget_steps()
        self.vote.verify_next()

    def forget_steps(self) -> None:
        """End the round without a vote: the next one begins where parameters are then, with what is loaded now."""
        self.steps, self._begun, self._displaced = 0, False, None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def open(self, stepping: Optimizer | None = None, *_: Any) -> None:
        """Take `x_0` down, before the first step of a round; of parameters that are added within one, before theirs."""
        if self._begun and stepping is not None and self._anchors.has_all_of(stepping):
            return
        moved = self.outer.find_parameters()  # what moves or adds any may be code of this rank alone
        if not self._begun:
            moved |= self._anchors.take_down()
        self._moved, self._begun = self._moved or moved, True

    def model_state(self) -> dict[str, Tensor]:
        """Return the model's state as it was when the round began."""
        return self._anchors.model_state(self._buffers.before())

    @torch.no_grad()
    def start_from(self, load: Callable[[], None]) -> None:
        """Load parameters and buffers; the steps since the last round are forgotten, and vote no more."""
        load()
        self.outer.find_parameters()
        self._anchors.take_down()
        self._buffers.take(())
        self._displaced = None

    @torch.no_grad()
    def keep_loaded(self, module: nn.Module) -> None:
        """Let a round that is open go on from what was loaded into a module: at its close it would be undone."""
        for p in module.parameters() if self.is_open else ():
            if p in self._anchors:
                self._anchors[p].copy_(p)
                self._moved = True

    @torch.inference_mode(False)  # outside of no_grad, which it would undo: momenta that it made could not be written
    @torch.no_grad()
    def close(self, early: bool) -> bool:
        """Close one round with the steps that this rank has; return whether that was early on all ranks."""
        self.open()
        try:
            outcome = self._taker.take(lambda: self._attempt(early))
            if outcome is not None:
                ends = self._ends(outcome.given.views)
                self.outer.take(outcome.verdicts, outcome.magnitudes)
                self._note_drift(ends)
                self._buffers.take(outcome.means)
        except BaseException:  # also an interrupt between two lines: parameters may hold displacements
            self.give_up()
            raise
        self._finish()
        if outcome is not None and outcome.verdicts:  # a round in which nobody moved is none
            self.outer.count()
            self._taker.end(lambda: self.vote.end(outcome.given))
        return outcome is not None and outcome.all_early

    def _attempt(self, early: bool) -> Outcome:
        """Vote on the displacements, which stay as they are."""
        self._displaced = self._displaced or self._displace()
        views, own = self._displaced
        given = StepInput(views, self.settings(), self.outer.optimizer.zeros, self.outer.rounds)
        ballot = self.vote.cast(given)
        magnitudes, changed, flags = self._exchange_magnitudes(own, _EARLY * early + _MOVED * self._moved)
        if (flags & _MOVED).any():
            self._compare_starts(given, ballot)
        verdicts = [] if ballot is None else self.vote.decide(ballot)
        means = self._buffers.mean(changed, self.vote.topology.everyone)
        return Outcome(given, verdicts, magnitudes, means, bool((flags & _EARLY).all()))

    def _compare_starts(self, given: StepInput, ballot: Ballot | None) -> None:
        """Make sure that all ranks have the same `x_0`, where a rank says that other code moved parameters.

        It says so beside its magnitudes: to decide alone to compare values would be a disagreement of its own.

        Raises:
            RanksDifferError: on all ranks, if not.
            PeerLostError: if a rank does not answer.
        """
        try:
            verify(self.vote, given.views, given.step, "when the round began", _BETWEEN_ROUNDS)
        except RanksDifferError:
            if ballot is not None and ballot.round is not None:
                ballot.round.wait_for_ballots()  # else a late one would be taken for one of the next vote
            raise
        self._moved = False

    def _displace(self) -> Displaced:
        """Return what to vote on, displacements for gradients, and their magnitudes, 0 where none moved (L1, L2).

        Displacements are in the memory of the parameters, which get their values back from `x_0` in any case.
        """
        kernel, outer = kernels.for_device(self._device), self.outer.optimizer
        adversary = (self.options.adversaries or {}).get(self.vote.topology.workers.rank)
        views, magnitudes = list[FlatView](), list[float]()
        for p, x in self._anchors.items():
            delta = p.detach() if p.dtype is x.dtype and p.is_contiguous() else p.detach().to(x, copy=True).contiguous()
            total = kernel.displace(x, delta)
            if adversary is not None and total:
                delta = _lie(adversary, delta)
                total = kernel.displace(delta, torch.zeros_like(delta))
            views.append(FlatView(x, outer.param_groups[0], outer.state, total > 0, sent=delta))
            magnitudes.append(total / max(x.numel(), 1))
        return views, magnitudes

    def _exchange_magnitudes(
        self, own: Sequence[float], flags: int
    ) -> tuple[list[float], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Swap one row of floats with every rank: its flags, which buffers changed, the magnitudes.

        Returns:
            The magnitude of every tensor (L3), on which rank which buffer changed, the flags of every rank.
        """
        changed = self._buffers.changed()
        everyone, cut = self.vote.topology.everyone, 1 + len(changed)
        row = torch.tensor([flags, *changed, *own], dtype=torch.float32, device="cpu")
        rows = everyone.gather(row.to(everyone.wire(self._device)), Message.MAGNITUDES).cpu().numpy()
        magnitudes: list[float] = core.median_magnitudes(rows[:, cut:]).tolist()
        return magnitudes, rows[:, 1:cut] > 0, rows[:, 0].astype(np.int64)

    def _ends(self, views: Sequence[FlatView]) -> list[Tensor]:
        """Return where this rank's steps ended, if somebody wants to know: parameters hold displacements meanwhile."""
        watched = any(observer.counts for observer in self.vote.observers)
        return [v.parameter - v.raw_gradient.view_as(v.parameter) for v in views] if watched else []

    def _note_drift(self, ends: Sequence[Tensor]) -> None:
        """Add up how far this rank's steps ended from where the vote has the parameters."""
        for end, x in zip(ends, self._anchors.values() if ends else (), strict=True):
            self.drift = self.drift[0] + float((end - x).square().sum()), self.drift[1] + x.numel()

    @torch.no_grad()
    def give_up(self) -> None:
        """End the round without a vote, with parameters and buffers as they were when it began."""
        self._finish()
        self._buffers.restore()

    def _finish(self) -> None:
        """Let parameters go to `x_0`."""
        self._anchors.put_back()
        self.forget_steps()

    def settings(self, without: Collection[str] = ()) -> list[str]:
        """Return what all ranks must have in common beside the parameters, without some settings of the outer step."""
        kinds = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        own = [self.options.in_words(), f"optimizers {kinds}", *self._buffers.in_words()]
        return [*own, *self.outer.optimizer.settings_in_words(without)]

    @property
    def _device(self) -> torch.device:
        return next(iter(self._anchors)).device


def find_local_steps(optimizer: object) -> LocalSteps | None:
    """Return the rounds that an optimizer takes part in, wrapped or not; None for none."""
    found = getattr(see_through(optimizer), LOCAL_STEPS, None)
    return found if isinstance(found, LocalSteps) else None


_OWN_GRADIENTS = (
    "this DistributedDataParallel model averages gradients of parameters that take local steps: train through the "
    "model inside, or call LocalSteps.end first"
)

_BETWEEN_ROUNDS = (
    "other code than the optimizers moved or added parameters between two rounds, and not alike on all ranks. Load or "
    "broadcast the same values there; a wrapper that moves parameters after its optimizer's step, as Lookahead does, "
    "cannot take local steps."
)


def _lie(adversary: Adversary, delta: Tensor) -> Tensor:
    """Return what an adversary sends instead of a displacement; nothing is zeros."""
    sent = adversary(delta.cpu().numpy())
    if sent is not None:
        check_lie(sent, tuple(delta.shape))
    return torch.zeros_like(delta) if sent is None else torch.as_tensor(sent).to(delta).contiguous()
