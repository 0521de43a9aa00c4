"""When ballots leave: all at the step, or each as soon as its gradients are final in the backward pass."""

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _compat
from ..memory import as_bytes
from ..views import FlatView, cover
from .local_gradients import remove_hooks

if TYPE_CHECKING:
    from ..optimizer import Signum
    from .round import Bucket, Round
    from .vote import Ballot, StepInput, Vote


class Schedule(ABC):
    """Casts and sends the ballots of a step."""

    @abstractmethod
    def cast(self, vote: "Vote", given: "StepInput") -> "Ballot | None":
        """Return the vote with all ballots sent, None where no rank has a gradient."""


class AtStep(Schedule):
    """All ballots leave at the step: while one bucket travels the next is cast."""

    def cast(self, vote: "Vote", given: "StepInput") -> "Ballot | None":
        """Cast the whole ballot now; see `Schedule.cast`."""
        ballot = vote.begin(given)
        if ballot is not None and ballot.round is not None:
            for bucket in list(ballot.round.waiting):
                ballot.round.send(bucket)
        return ballot


class DuringBackward(Schedule):
    """Ballots travel while the backward pass goes on; the verdicts are the same bits.

    The ranks compare notes when the first gradient is final. From then on each bucket leaves once all its gradients
    are, last bucket first, so that all ranks send in one order. At the step the rest leaves. Nothing may change a
    gradient in between, since the momentum already has it.

    Args:
        optimizer: whose parameters are watched, with the vote as its `vote`.
        is_last: whether the backward pass that goes on is the last before the step.
    """

    def __init__(self, optimizer: "Signum", is_last: Callable[[], bool]) -> None:
        self._optimizer, self._is_last = weakref.ref(optimizer), is_last
        self._begun: _Begun | None = None
        self._stream: torch.cuda.Stream | None = None
        me = weakref.ref(self)  # hooks outlive what they hold strongly, and so would the process group

        def hook(parameter: Tensor) -> None:
            if schedule := me():
                schedule.arrive(parameter)

        parameters = [view.parameter for view in optimizer.views() if view.parameter.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(hook) for p in parameters]  # type: ignore[no-untyped-call]
        weakref.finalize(self, remove_hooks, handles)

    @torch.no_grad()
    def arrive(self, parameter: Tensor) -> None:
        """Take note that a gradient is final, unless the backward pass only adds to it; send what is ready.

        Raises:
            PeerLostError: if a rank does not answer within the process group's timeout.
            RuntimeError: if the ranks disagree; if the last vote's gradients were final and `step` was not called.
        """
        optimizer = self._optimizer()
        if optimizer is None or optimizer.vote is None or not self._is_last() or parameter.grad is None:
            return  # hooks fire for undefined gradients, too
        if self._begun is None:
            given = optimizer.step_input()
            for view in given.views:
                view.present = view.parameter.requires_grad
            self._begun = _Begun(given, optimizer.vote.begin(given))
            _compat.queue_callback(self._note_versions_last)
        begun = self._begun
        if id(parameter) in begun.final:
            name = optimizer.vote.name_of(parameter)
            raise RuntimeError(
                f"a second gradient of {name} came before step(), after the first was voted with: with overlap=True "
                "put all backward passes but the last into DDP's no_sync(), or without DDP leave out accumulation, and "
                "follow the last by step()"
            )
        begun.final[id(parameter)] = _sample(parameter)
        while begun.waiting and begun.is_ready(begun.waiting[-1]):
            self._leave(begun)

    def cast(self, vote: "Vote", given: "StepInput") -> "Ballot | None":
        """Send the rest of what is under way.

        Raises:
            RuntimeError: if a gradient or a setting was changed since the backward pass, or is to be scaled now.
        """
        begun = self._begun or _Begun(given, vote.begin(given))
        self._begun = None
        try:
            begun.check(vote, given)
        except RuntimeError:
            if begun.round is not None:
                begun.round.wait_for_ballots()
            raise
        while begun.waiting:
            self._leave(begun)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return begun.ballot

    def _leave(self, begun: "_Begun") -> None:
        """Cast and send the next bucket, on a stream beside the backward pass' where there are streams."""
        assert begun.round is not None
        bucket = begun.waiting[-1]
        with self._beside(begun.covered(bucket)):
            begun.round.send(bucket)

    def _beside(self, views: Iterable[FlatView]) -> contextlib.AbstractContextManager[Any]:
        first, *_ = views = list(views)
        device = first.parameter.device
        if device.type != "cuda":
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        for view in views:
            if view.present:
                view.raw_gradient.record_stream(self._stream)  # DDP may free it once it is in its bucket
        return torch.cuda.stream(self._stream)

    def _note_versions_last(self) -> None:
        """After the backward pass, and after DDP's own last touch, which is queued behind this."""
        _compat.queue_callback(self._note_versions)

    def _note_versions(self) -> None:
        if self._begun is not None:
            self._begun.note_versions()


class _Begun:
    """A vote that began in the backward pass.

    Attributes:
        final: some entries of each gradient that is, by the parameter's id, as it was voted with.
        versions: of the gradients after the backward pass, by the parameter's id; each change adds to it.
    """

    def __init__(self, given: "StepInput", ballot: "Ballot | None") -> None:
        self.given, self.ballot = given, ballot
        self.final = dict[int, Tensor]()
        self.versions: dict[int, int] | None = None

    @property
    def round(self) -> "Round | None":
        return None if self.ballot is None else self.ballot.round

    @property
    def waiting(self) -> "list[Bucket]":
        """The buckets that have not left yet; the last goes first, as the backward pass does."""
        return [] if self.round is None else self.round.waiting

    def covered(self, bucket: "Bucket") -> list[FlatView]:
        """Return the views that have coordinates in a bucket."""
        assert self.round is not None
        return [view for view, _, _ in cover(self.round.share.views, bucket.lo, bucket.hi)]

    def is_ready(self, bucket: "Bucket") -> bool:
        """Tell whether all gradients of a bucket are final."""
        return all(id(view.parameter) in self.final for view in self.covered(bucket))

    def note_versions(self) -> None:
        """Take note of which version each gradient has."""
        gradients = {id(view.parameter): view.parameter.grad for view in self.given.views}
        self.versions = {key: _compat.version(g) for key, g in gradients.items() if g is not None}

    def check(self, vote: "Vote", now: "StepInput") -> None:
        """Make sure that what was voted with is what is there now."""
        settings = [old for old, new in zip(self.given.settings, now.settings, strict=False) if old != new]
        if settings:
            raise RuntimeError(
                f"{vote.label} was changed after the vote had begun, in the backward pass ({settings[0]}): with "
                "overlap=True change settings before it or after step()"
            )
        if any(view.inverse_scale is not None for view in now.views) and self.final:
            raise RuntimeError(
                "overlap=True takes gradients as the backward pass leaves them, which a gradient scaler has multiplied:"
                " train in bfloat16 or without mixed precision, or leave out overlap"
            )
        for view in [] if self.round is None else self.round.share.views:
            p, name = view.parameter, vote.name_of(view.parameter)
            if view.present and p.grad is None:
                raise RuntimeError(
                    f"overlap=True needs a gradient for every parameter, {name} has none: leave out overlap"
                )
            if p.grad is not None and self._changed(p, p.grad):
                raise RuntimeError(
                    f"the gradient of {name} was changed between backward() and step(), after it was voted with: "
                    "overlap=True excludes clipping and whatever else changes gradients; leave out either"
                )

    def _changed(self, parameter: Tensor, gradient: Tensor) -> bool:
        """Tell whether a gradient changed; versions do not tell of changes through `.data` or NumPy."""
        seen = self.final.get(id(parameter))
        version = None if self.versions is None else self.versions.get(id(parameter))
        other = version is not None and version != _compat.version(gradient)
        return other or (seen is not None and not torch.equal(seen, _sample(parameter)))


def _sample(parameter: Tensor) -> Tensor:
    """Return some bits of a parameter's gradient, spread over it."""
    assert parameter.grad is not None
    flat = parameter.grad.detach().reshape(-1)
    return as_bytes(flat[:: max(1, flat.numel() // _SAMPLES)].clone())


_SAMPLES = 64
