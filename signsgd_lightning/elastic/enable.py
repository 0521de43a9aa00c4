"""A vote of whoever is there, in plain torch: one line behind the optimizer."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.adversaries import Adversary

from .. import _compat
from ..checks import check_vote
from ..optimizer import Signum, find_signum
from ..vote import PeerLostError, RanksDifferError, StepInput, Vote, VoteOptions
from ..vote.local_gradients import keep_local, release
from ..vote.topology import Flat
from .membership import Membership, Place, find_place
from .state import SharedState, SharedSteps, Stateful
from .transport import Members


def enable_elastic_vote(
    model: nn.Module,
    optimizer: Signum,
    *,
    lighthouse: str | None = None,
    min_workers: int = 2,
    timeout: timedelta = timedelta(seconds=30),
    state: Mapping[str, Stateful] | None = None,
    hostname: str | None = None,
    verify_every_n_steps: int = 0,
    adversaries: Mapping[int, Adversary] | None = None,
) -> "ElasticVote":
    """Let every step of the optimizer be a majority vote of the workers that are there.

    Workers are started one by one, without `torch.distributed.init_process_group`, and find each other through
    ``torchft_lighthouse --min_replicas 1``. One that is lost costs the others the time to notice it: they take the step
    again without it. One that comes takes over parameters, buffers, verdict momenta, settings, counters and `state`
    from another; a private momentum (``betas`` above 0) starts at zero.

    Args:
        model: not wrapped in `DistributedDataParallel`.
        optimizer: of the model's parameters.
        lighthouse: its address, "http://host:port". None is the environment's ``TORCHFT_LIGHTHOUSE``.
        min_workers: with fewer of them training waits.
        timeout: how long a worker that does not answer is waited for. Make it longer than a copy of the state takes.
        state: what a newcomer is to take over besides, by name: schedulers, whatever has a ``state_dict`` of tensors
            and plain values.
        hostname: by which the other workers reach this machine. None is `socket.gethostname`.
        verify_every_n_steps: how often all workers make sure that they hold the same bits; 0 for never. After every
            change of the quorum they do so in any case.
        adversaries: number in the quorum -> what that worker makes of its gradients (`signsgd_core.adversaries`).

    Returns:
        What tells about the vote, and closes it.

    Raises:
        TypeError: if the optimizer is not a `Signum`.
        ValueError: without a lighthouse; for settings outside their range; for a model wrapped in DDP, or what
            `enable_majority_vote` refuses.

    Example:
        >>> vote = enable_elastic_vote(model, optimizer)  # doctest: +SKIP
        >>> while vote.step < 1000:  # doctest: +SKIP
        ...     optimizer.step(closure)  # which draws a batch and computes gradients
        >>> vote.close()  # doctest: +SKIP
    """
    model, optimizer = _compat.uncompiled(model), find_signum(optimizer)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("workers that come and go do without DistributedDataParallel: pass the model unwrapped")
    if optimizer.vote is not None:
        raise ValueError("this optimizer votes already: make a new one for an elastic vote")
    check_vote(model, [optimizer])
    place = find_place(lighthouse, min_workers, timeout, hostname)
    return ElasticVote(model, optimizer, place, state or {}, VoteOptions(verify_every_n_steps, adversaries))


class ElasticVote:
    """The votes of one optimizer with the workers that are there.

    A step asks for a quorum, calls the closure if there is one, votes, and commits. If a worker is lost meanwhile,
    nothing was changed, and the step is taken again with the quorum that is left.

    Args:
        model: whose parameters they are.
        optimizer: that votes.
        place: where and how workers meet.
        others: what else a newcomer takes over, by name.
        options: of the vote.
        recompute: whether the closure is called again for a step that is taken again; else the gradients stay.

    Attributes:
        workers: how many voted last; 0 before the first vote.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Signum,
        place: Place,
        others: Mapping[str, Stateful],
        options: VoteOptions,
        recompute: bool = True,
    ) -> None:
        self.workers = 0
        self._model, self._optimizer = model, optimizer
        self._begun, self._stale, self._closed = False, False, False
        self._closure: Callable[[], Any] | None = None
        self._recompute = recompute
        members = Members(place.timeout)
        names = {id(p): name for name, p in model.named_parameters()}
        self._vote = Vote(Flat(members, changes=True), names, options=options, model=model)
        self._vote.taker = self._take
        optimizer.vote = self._vote
        state = SharedState(SharedSteps(model, optimizer), others)
        self._membership = Membership(place, members, state.save, state.load, lambda: optimizer.t)
        keep_local(model, guard=True)
        optimizer.register_step_pre_hook(self._before)

    @property
    def step(self) -> int:
        """How many steps were taken, by this worker or by whom it took over from."""
        return self._optimizer.t

    @property
    def number(self) -> int:
        """This worker's number in the quorum: 0, 1, … without gaps; another one when the quorum changes."""
        return self._membership.workers.rank

    @property
    def batches(self) -> int:
        """How many batches were voted on so far, of all workers and steps."""
        return self._membership.batches

    @property
    def next_batch(self) -> int:
        """The number of the batch that this worker is to draw next, counted through all steps and workers."""
        return self.batches + self.number

    def begin(self) -> None:
        """Wait for the quorum of the next step now, where a batch is drawn before `Signum.step` and not in a closure.

        Raises:
            RuntimeError: if this worker has another model or other settings than the others; after `close`.
        """
        if not self._begun:
            self._meet()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs besides model and optimizer: how many batches were voted on."""
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, as does every worker that starts anew, before the first step.

        Raises:
            RuntimeError: once this worker has joined the others.
        """
        self._membership.go_on(state_dict["batches"])

    def close(self) -> None:
        """Leave the other workers; the optimizer takes no step any more."""
        self._closed, self._begun = True, False
        self._membership.leave()
        release(self._model)

    def _before(self, _: Signum, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait for the quorum before the closure is called; without one a newcomer's gradient is of no use."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._closure = closure if self._recompute else None
        healed = not self._begun and self._meet()
        self._stale = healed and self._closure is None

    def _meet(self) -> bool:
        """Wait for a quorum; return whether this worker took over the others' state."""
        if self._closed:
            raise RuntimeError("this elastic vote was closed: call enable_elastic_vote again, with a new optimizer")
        changed, healed = self._membership.meet()
        if changed:
            self._vote.verify_next()
        self._begun = True
        return healed

    def _take(self, given: StepInput) -> None:
        """Take a step with whoever is there, as often as somebody is lost meanwhile."""
        while not self._attempt(given):
            given = self._again()
        self.workers, self._begun = self._membership.workers.world_size, False
        try:
            self._vote.end(given)
        except (PeerLostError, RanksDifferError) as error:  # the step is taken; the next quorum sees to it
            self._membership.recover(error)

    def _attempt(self, given: StepInput) -> bool:
        """Vote and commit; return whether that was possible. If not, nothing that is the same on all was changed."""
        for view in given.views if self._stale else ():
            view.present = False  # its gradient is one of other parameters
        try:
            self._vote.take(given, self._commit)
            return True
        except (PeerLostError, RanksDifferError) as error:
            self._membership.recover(error)
            return False
        except BaseException as error:
            self._begun = False
            self._membership.fail(RuntimeError(repr(error)))
            raise

    def _again(self) -> StepInput:
        """Wait for the quorum that is left, and return what the step is about now."""
        healed = self._meet()
        if self._closure is None:
            self._stale = self._stale or healed
        else:
            with torch.enable_grad():
                self._closure()
            self._stale = False
        return self._optimizer.step_input()

    def _commit(self) -> None:
        if not self._membership.commit():
            raise PeerLostError("the step cannot be committed")
