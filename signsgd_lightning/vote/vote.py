"""The vote of one optimizer: whoever votes with whom, however bytes travel and whenever they leave."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from signsgd_core import Zeros, planes
from signsgd_core.wire import WIRE_VERSION

from .. import kernels
from ..views import FlatView
from .agreement import Purpose, agree, describe, meet
from .observers import Observer, note_for
from .options import VoteOptions
from .round import Round
from .schedule import AtStep, Schedule
from .topology import Share, Topology, Verdict
from .transport import Message
from .verification import Verification, verify_first


class StepInput(NamedTuple):
    """What a step of the optimizer is about.

    Attributes:
        views: all its parameters, also those without a gradient on this rank.
        settings: its settings in words, the same on all ranks.
        zeros: the zero rule.
        step: `t`.
    """

    views: Sequence[FlatView]
    settings: Sequence[str]
    zeros: Zeros
    step: int


class Ballot(NamedTuple):
    """A vote that has begun: what it is about, this rank's share, and the round of that, None if it is empty."""

    input: StepInput
    share: Share
    round: Round | None


class Vote:
    """Takes an optimizer's steps by the majority of its workers' ballots: prepare, then commit.

    A step first makes sure that all ranks are about to vote on the same, by 32 bytes each way. Then ballots go up and
    verdicts come down. Parameters and verdict momenta change only when every verdict of the step has arrived: a step
    that fails midway leaves them as they were, bit for bit.

    Args:
        topology: which ranks are one worker.
        names: what to call a parameter in messages, by its id.
        label: the optimizer's, the same on all ranks.
        options: of the vote.
        schedule: when ballots leave.
        model: whose parameters they are; a vote ends with it. It is not kept alive.

    Attributes:
        observers: are told what happens; `observe` adds one.
        taker: takes a step by `take` and `end`, and again where workers are lost meanwhile; None where one that fails
            is not tried again.
    """

    def __init__(
        self,
        topology: Topology,
        names: Mapping[int, str],
        label: str = "optimizer 0",
        options: VoteOptions | None = None,
        schedule: Schedule | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.topology, self.label, self.options = topology, label, options or VoteOptions()
        self.schedule: Schedule = schedule or AtStep()
        self.observers: list[Observer] = []
        if self.options.verify_every_n_steps:
            self.observers.append(Verification(self.options.verify_every_n_steps))
        self._names, self._same = names, False
        self._model = None if model is None else weakref.ref(model)
        self.taker: Callable[[StepInput], None] | None = None

    def verify_next(self) -> None:
        """Make sure at the next vote, before it, that all ranks hold the same values: some were loaded or added."""
        self._same = False

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer of every vote from now on; return what ends that."""
        self.observers.append(observer)
        return lambda: self.observers.remove(observer)

    def step(self, given: StepInput) -> None:
        """Take one step of every parameter by the majority's verdict.

        Args:
            given: what the step is about.

        Raises:
            PeerLostError: if a rank does not answer within the process group's timeout; then nothing that is the same
                on all ranks was changed on this one.
            RuntimeError: if the ranks disagree; likewise.
            RanksDifferError: if they are no longer the same, where that is looked at.
        """
        if self._model is not None and self._model() is None:
            raise RuntimeError(
                "the model that this vote was enabled with is gone, and another wrapper may average the gradients: "
                "call enable_majority_vote again, with the model as it is wrapped now"
            )
        if not given.views:
            return
        if self.taker is not None:
            self.taker(given)
            return
        self.take(given)
        self.end(given)

    def take(self, given: StepInput, before_commit: Callable[[], None] = lambda: None) -> None:
        """Prepare, then commit; raises as `step`.

        Args:
            given: what the step is about.
            before_commit: is called when all verdicts have arrived. If it raises, nothing is committed.
        """
        ballot = self.cast(given)
        verdicts = [] if ballot is None else self.decide(ballot)
        before_commit()
        if ballot is not None:
            self._commit(ballot.share.moved, verdicts)

    def cast(self, given: StepInput) -> Ballot | None:
        """Return a vote with all ballots sent, None where no rank has a gradient; raises as `step`."""
        return self.schedule.cast(self, given)

    def decide(self, ballot: Ballot) -> list[Verdict]:
        """Return all verdicts that this rank is to apply, once they have arrived; raises as `step`."""
        bits = None if ballot.round is None else ballot.round.decide()
        return ballot.share.spread(bits, planes(ballot.input.zeros))

    def end(self, given: StepInput) -> None:
        """Tell the observers that a step is taken; raises as `step`."""
        for observer in self.observers:
            observer.end(self, given.views, given.step)

    def begin(self, given: StepInput) -> Ballot | None:
        """Begin a vote: compare notes and find this rank's share; no ballot is cast yet.

        Returns:
            The vote, None where no rank has a gradient for anything.

        Raises:
            PeerLostError: if a rank does not answer.
            RuntimeError: if the ranks disagree, on all of them.
        """
        self.topology.keep_share(given.views)
        adversary = (self.options.adversaries or {}).get(self.topology.workers.rank)
        for view in given.views:
            if adversary is not None and view.present:
                view.lie(adversary)
        present = self.agree(given.views, given.settings)
        if not self._same:
            unused = (~present.any(0)).nonzero().flatten().tolist()
            self._check_not_replaced([given.views[k] for k in unused])
            verify_first(self, given.views, given.step)
            self._same = True
        if not present.any():
            return None
        watching = [observer for observer in self.observers if observer.counts]
        share = self.topology.share(given.views, present, self.options.bucket_size, note_for(watching))
        for observer in watching:
            observer.begin(share.moved)
        if not any(view.parameter.numel() for view in share.views):
            return Ballot(given, share, None)
        workers, size = self.topology.workers, self.options.bucket_size
        return Ballot(given, share, Round(workers, share, given.zeros, given.step, size, watching))

    def agree(self, views: Sequence[FlatView], settings: Sequence[str], purpose: Purpose = Purpose.VOTE) -> Tensor:
        """Make sure that all ranks have the same parameters and settings.

        Returns:
            Which rank has a gradient for what, bool of shape (ranks, views).

        Raises:
            PeerLostError: if a rank does not answer within the process group's timeout.
            RuntimeError: if they differ, on all ranks, naming the first difference.
        """
        size, overlap = self.options.bucket_size, self.options.overlap
        lines = [f"wire version {WIRE_VERSION}", f"{self.label}: bucket_size={size}, overlap={overlap}"]
        lines.append(f"{'nothing' if self._same else 'a state or parameter'} loaded or added since the last vote")
        lines += settings
        for view in views:
            kept = ", ".join(view.shared_names())
            p = view.model_parameter
            lines.append(describe(self.name_of(p), p) + (f", {kept}" if kept else ""))
        here = torch.tensor([view.present for view in views], dtype=torch.bool, device="cpu")
        everyone = self.topology.everyone
        return agree(everyone, lines, here, everyone.wire(views[0].parameter.device), purpose)

    def gather_counts(self, row: Tensor) -> Tensor:
        """Return what each worker counted, from what each rank did: shape (workers, counts), on the CPU."""
        everyone = self.topology.everyone
        wire = everyone.wire(row.device)
        with everyone.uncounted():
            meet(everyone, Purpose.FIGURES, wire)
            rows = everyone.gather(row.to(wire), Message.FIGURES)
        return self.topology.by_worker(rows.cpu())

    def name_of(self, parameter: Tensor) -> str:
        """Return what to call a parameter in messages."""
        key = id(parameter)
        if key in self._names:
            return self._names[key]
        model = None if self._model is None else self._model()
        if model is not None:  # it is of a group that was added since
            later = {id(p): name.removeprefix("module.") for name, p in model.named_parameters()}
            self._names = {**self._names, key: later.get(key, "a parameter")}
        return self._names.get(key, "a parameter")

    def _check_not_replaced(self, unused: Sequence[FlatView]) -> None:
        """Make sure that parameters without a gradient are still the model's: fully_shard puts others in their place.

        Raises:
            RuntimeError: on all ranks, if one is not.
        """
        model = None if self._model is None else self._model()
        there = set() if model is None else {id(p) for p in model.parameters()}
        for view in unused if there else ():
            key = id(view.model_parameter)
            if key in self._names and key not in there:
                raise RuntimeError(
                    f"no rank has a gradient for {self.name_of(view.model_parameter)}, and the model has another "
                    "parameter in its place, as after fully_shard: shard the model first, then make the optimizer and "
                    "enable the vote"
                )

    def _commit(self, moved: Sequence[FlatView], verdicts: Sequence[Verdict]) -> None:
        """Move parameters and verdict momenta; nothing here waits for another rank, or can be refused."""
        for verdict in verdicts:
            if verdict.views:
                device = verdict.views[0].parameter.device
                kernel = kernels.for_device(device)
                kernel.apply(verdict.views, 0, verdict.views[-1].stop, verdict.bits.to(device))
        for view in moved:
            view.finish()
