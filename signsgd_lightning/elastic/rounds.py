"""Local steps of whoever is there: a quorum once a round, and rounds that outlive who took part in them."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from signsgd_core.adversaries import Adversary

from .. import _compat
from ..local_steps import LocalSteps
from ..local_steps.enable import check
from ..local_steps.options import LocalStepOptions
from ..local_steps.taking import Outcome
from ..optimizer import see_through
from ..vote import PeerLostError, RanksDifferError
from ..vote.topology import Flat
from ..vote.transport import Message
from .membership import Membership, Place, find_place
from .state import SharedRounds, SharedState, Stateful
from .transport import Members


def enable_elastic_local_steps(
    model: nn.Module,
    *optimizers: Optimizer,
    sync_every: int = 16,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    lighthouse: str | None = None,
    min_workers: int = 2,
    timeout: timedelta = timedelta(seconds=30),
    state: Mapping[str, Stateful] | None = None,
    hostname: str | None = None,
    verify_every_n_rounds: int = 0,
    adversaries: Mapping[int, Adversary] | None = None,
) -> "ElasticLocalSteps":
    """Let every worker take steps of its own, and those that are there vote on where they went.

    Workers meet as under `enable_elastic_vote`, once a round; for the mathematics see `enable_local_steps`. If one is
    lost, those that are left vote again on the steps that they have taken. One that comes meanwhile abstains from that
    vote. It takes over parameters and buffers as the round began, outer momenta, settings, counters and `state`; its
    inner optimizers' states start afresh.

    Args:
        model: not wrapped in `DistributedDataParallel`.
        *optimizers: any, of the model's parameters, in the same order on all workers.
        sync_every: `H`.
        outer_lr: η.
        outer_momentum: μ, Nesterov's.
        lighthouse: its address, "http://host:port". None is the environment's ``TORCHFT_LIGHTHOUSE``.
        min_workers: with fewer of them training waits.
        timeout: how long a worker that does not answer is waited for. Make it longer than a copy of the state takes,
            and than the workers' times for `H` steps differ.
        state: what a newcomer is to take over besides, by name; see `enable_elastic_vote`.
        hostname: by which the other workers reach this machine. None is `socket.gethostname`.
        verify_every_n_rounds: how often all workers make sure that they hold the same bits; 0 for never. After every
            change of the quorum they do so in any case.
        adversaries: number in the quorum -> what that worker makes of its displacements.

    Returns:
        What tells about the rounds, and ends them.

    Raises:
        TypeError: if something is no optimizer, or the model no module.
        ValueError: without a lighthouse; for settings outside their range, and what `enable_local_steps` refuses.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # doctest: +SKIP
        >>> local = enable_elastic_local_steps(model, optimizer, sync_every=16)  # doctest: +SKIP
        >>> while local.rounds < 100:  # doctest: +SKIP
        ...     optimizer.step(closure)  # which draws a batch and computes gradients
        >>> local.close()  # doctest: +SKIP
    """
    options = LocalStepOptions(sync_every, outer_lr, outer_momentum, verify_every_n_rounds, adversaries)
    model, found = _compat.uncompiled(model), [see_through(optimizer) for optimizer in optimizers]
    check(model, found)
    place = find_place(lighthouse, min_workers, timeout, hostname)
    return ElasticLocalSteps(model, found, options, place, state or {})


class ElasticLocalSteps:
    """Rounds of local steps with the workers that are there.

    Args:
        model: whose parameters they are.
        optimizers: that take the steps; the last one's are counted.
        options: of the rounds.
        place: where and how workers meet.
        others: what else a newcomer takes over, by name.

    Attributes:
        local: the rounds themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        options: LocalStepOptions,
        place: Place,
        others: Mapping[str, Stateful],
    ) -> None:
        self._members, self._closed = Members(place.timeout), False
        # Ahead of the hooks of LocalSteps, which begin a round.
        self._handles = [optimizer.register_step_pre_hook(self._before) for optimizer in optimizers]
        self._taker = _Taker(options.sync_every)
        ranks = Flat(self._members, changes=True)
        self.local = LocalSteps(model, optimizers, options, ranks, self._taker)
        shared = SharedRounds(model, self.local, lambda: self._taker.voted_on, self._taker.go_on)
        state = SharedState(shared, others)
        self._taker.membership = Membership(place, self._members, state.save, state.load, lambda: self.rounds)
        self._taker.verify_next = self.local.vote.verify_next

    @property
    def rounds(self) -> int:
        """How many rounds there were, of this worker or of whom it took over from."""
        return self.local.outer.rounds

    @property
    def is_open(self) -> bool:
        """Whether this worker took a step since the last round: its parameters are its own until the vote."""
        return self.local.steps > 0

    @property
    def workers(self) -> int:
        """How many voted last, those included that abstained; 0 before the first vote."""
        return self._taker.workers

    @property
    def number(self) -> int:
        """This worker's number in the quorum: 0, 1, … without gaps; another one when the quorum changes."""
        return self._members.rank

    @property
    def batches(self) -> int:
        """How many batches were drawn in all rounds so far, by all workers."""
        return self._taker.voted_on

    @property
    def next_batch(self) -> int:
        """The number of the batch that this worker is to draw next, counted through all rounds and workers."""
        return self._taker.first + self.local.steps

    def begin(self) -> bool:
        """Wait for the quorum of the next round now, if this worker is between rounds.

        Returns:
            Whether this worker took over the others' state.

        Raises:
            RuntimeError: if this worker has another model or other settings than the others; after `close`.
        """
        if self._closed:
            raise RuntimeError("these elastic local steps were closed: call enable_elastic_local_steps again")
        healed = self._taker.catch_up()
        while not self._taker.begun:
            self.local.open()
            closes, took_over = self._taker.call_the_roll(False)
            healed = healed or took_over
            if closes:
                self.local.close(early=False)  # without a step of this worker's
                self._taker.abstained()
        return healed

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs besides model and optimizers: outer momenta, rounds, batches drawn."""
        return {"outer": self.local.state_dict(), "batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, as does every worker that starts anew, before the first step.

        Raises:
            RuntimeError: once this worker has joined the others.
            ValueError: if it is the state of a vote at every step.
        """
        if "outer" not in state_dict:
            raise ValueError(
                "this is the state of an elastic vote at every step, not of local steps: go on as it was saved, or "
                "load the weights alone"
            )
        assert self._taker.membership is not None
        self._taker.membership.go_on(state_dict["batches"])
        self._taker.go_on(state_dict["batches"])
        self.local.load_state_dict(state_dict["outer"])

    def close(self) -> None:
        """Leave the other workers, and let the optimizers take steps without votes; an open round is given up."""
        if self.is_open:
            self.local.give_up()
        self._closed = True
        assert self._taker.membership is not None
        self._taker.membership.leave()
        self.local.end()
        for handle in self._handles:
            handle.remove()

    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait for the quorum before the first step of a round; a newcomer's gradient is one of other parameters."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self.begin() and closure is None:
            for p in (p for one in self.local.optimizers for group in one.param_groups for p in group["params"]):
                p.grad = None


class _Taker:
    """Takes rounds with whoever is there, and counts the batches that they draw.

    A worker that asks for the quorum of a new round may meet others that vote on the last one again. So all of a quorum
    first call the roll: if somebody closes a round, all vote at once, and who took no step abstains.

    Args:
        sync_every: `H`.

    Attributes:
        membership: of this worker.
        verify_next: makes the next vote compare parameters.
        begun: whether the quorum of a round was met.
        workers: how many voted last.
        voted_on: how many batches were drawn in the rounds so far.
        first: the number of the first batch of this worker in this round.
    """

    def __init__(self, sync_every: int) -> None:
        self.membership: Membership | None = None
        self.verify_next: Callable[[], None] = lambda: None
        self.begun, self.workers, self.voted_on, self.first = False, 0, 0, 0
        self._sync_every, self._drawn, self._late = sync_every, 0, False

    def go_on(self, voted_on: int) -> None:
        """Go on from another worker's count of batches."""
        self.voted_on = voted_on

    def call_the_roll(self, closing: bool) -> tuple[bool, bool]:
        """Wait for a quorum, and learn what it is for.

        Args:
            closing: whether this worker has a round to close.

        Returns:
            Whether a round is to be closed, whether this worker took over the others' state.
        """
        assert self.membership is not None
        members, healed = self.membership.workers, False
        while True:
            changed, took_over = self.membership.meet()
            healed = healed or took_over
            closing = closing and not healed  # the steps that it would vote on are gone
            row = torch.tensor([closing, changed or healed, self._drawn if closing else self.voted_on], device="cpu")
            try:
                rows = members.gather(row, Message.ROLL)
                break
            except PeerLostError as error:
                self.membership.recover(error)
        if rows[:, 1].any():
            self.verify_next()
        closers = rows[rows[:, 0] > 0, 2]
        self.begun = not len(closers)
        if self.begun:
            self.voted_on = int(rows[:, 2].max())
            self.first = self.voted_on + self._sync_every * members.rank
            self._drawn = self.voted_on + self._sync_every * members.world_size
        else:
            self._drawn = int(closers.max())
        return not self.begun, healed

    def take(self, attempt: Callable[[], Outcome]) -> Outcome | None:
        """Vote and commit, as often as somebody is lost; None if the others took the round without this worker."""
        assert self.membership is not None
        while True:
            try:
                outcome = attempt()
                if not self.membership.commit():
                    raise PeerLostError("the round cannot be committed")
                break
            except (PeerLostError, RanksDifferError) as error:
                self.membership.recover(error)
            except BaseException as error:
                self.begun = False
                self.membership.fail(RuntimeError(repr(error)))
                raise
            closes, _ = self.call_the_roll(True)
            if not closes:
                self._late = True
                return None
        self.workers, self.begun, self.voted_on = self.membership.workers.world_size, False, self._drawn
        return outcome

    def catch_up(self) -> bool:
        """Take over the state again if it came with a round that others had closed without this worker.

        Code between rounds, a schedule's step, then ran on this worker behind that, and on the others ahead of it.

        Returns:
            Whether that was so.
        """
        assert self.membership is not None
        late, self._late = self._late, False
        if late:
            self.membership.take_over_again()
        return late

    def abstained(self) -> None:
        """Take over the others' state with the next quorum: this worker did not run their code between rounds."""
        assert self.membership is not None
        self._late = False  # what came with such a round is behind that code
        if not self.begun:
            self.membership.start_over()

    def end(self, tell: Callable[[], None]) -> None:
        """Tell the observers; the round is taken, so that the next quorum sees to what they find."""
        assert self.membership is not None
        try:
            tell()
        except (PeerLostError, RanksDifferError) as error:
            self.membership.recover(error)
