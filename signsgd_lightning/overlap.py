"""The vote that begins in the backward pass: a block's ballots leave as soon as its gradients are final."""

import contextlib
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.variable import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from signsgd_core import Zeros
from signsgd_core.adversaries import Adversary

from .exchange import BLOCK_SIZE, Exchange, _Ballots, _Block
from .nodes import VoteBetween
from .segments import Segment, cover, lay_out

if TYPE_CHECKING:
    from .optimizer import Signum


class _Vote:
    """One vote under way.

    Attributes:
        segments: all parameters of the optimizer.
        voted: the numbers of those that some worker has a gradient for.
        who: which worker has a gradient for which of them.
        final: the parameters whose gradients are, by id.
        blocks: those that have not left yet; the last goes first, as the backward pass does.
        sent: those that have.
        versions: of the gradients after the backward pass, by the parameter's id; each change adds to it.
    """

    def __init__(self, segments: list[Segment], voted: list[int], present: Tensor, statement: list[str]) -> None:
        self.segments, self.voted, self.statement = segments, voted, statement
        self.chosen, self.who = [segments[k] for k in voted], present[:, voted]
        self.final = set[int]()
        self.blocks, self.sent = list[_Block](), list[_Ballots]()
        self.versions: dict[int, int] | None = None

    def ready(self, block: _Block) -> bool:
        """Whether all gradients of a block are final."""
        return all(id(segment.parameter) in self.final for segment, _, _ in cover(self.chosen, block.lo, block.hi))


class OverlapExchange(Exchange):
    """One optimizer's vote, whose ballots travel while the backward pass goes on; the verdicts are the same bits.

    The ranks compare notes when the first gradient is final. From then on each block leaves once all its gradients
    are, last block first, so that all ranks send in one order. `vote` waits for the rest, counts and applies. Nothing
    may change a gradient in between, since the momentum already has it.

    Args:
        ddp_model: whose backward passes synchronise, or do not, under `no_sync`.
        optimizer: its parameters are watched.
        parameter_names: how to call a parameter in messages, by its id.
        name: of the optimizer, the same on all ranks.
        block_size: coordinates in a block; the verdict does not depend on it.
    """

    overlap = True

    def __init__(
        self,
        ddp_model: DistributedDataParallel,
        optimizer: "Signum",
        parameter_names: dict[int, str],
        name: str = "optimizer 0",
        block_size: int = BLOCK_SIZE,
    ) -> None:
        super().__init__(ddp_model.process_group, parameter_names, name, block_size)
        self._model, self._optimizer = weakref.ref(ddp_model), weakref.ref(optimizer)
        self._ongoing: _Vote | None = None
        self._stream: torch.cuda.Stream | None = None
        me = weakref.ref(self)  # hooks outlive what they hold strongly, and so would the process group

        def hook(parameter: Tensor) -> None:
            if exchange := me():
                exchange.arrive(parameter)

        parameters = [segment.parameter for segment in optimizer.segments() if segment.parameter.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(hook) for p in parameters]  # type: ignore[no-untyped-call]
        weakref.finalize(self, _remove, handles)

    @torch.no_grad()
    def arrive(self, parameter: Tensor) -> None:
        """Take note that a gradient is final, unless the backward pass only adds to it; send what is ready.

        Raises:
            PeerLostError: if a rank does not answer within the process group's timeout.
            RuntimeError: if the ranks disagree; if the last vote's gradients were final and `step` was not called.
        """
        model, optimizer = self._model(), self._optimizer()
        if model is None or optimizer is None or not model.require_backward_grad_sync or parameter.grad is None:
            return  # hooks fire for undefined gradients, too
        if self._ongoing is None:
            segments = optimizer.segments()
            for segment in segments:
                segment.present = segment.parameter.requires_grad
            self._ongoing = self._begin(segments, optimizer.statement())
            Variable._execution_engine.queue_callback(self._note_versions_last)
        ongoing = self._ongoing
        if id(parameter) in ongoing.final:
            raise RuntimeError(
                f"a second gradient of {self._name(parameter)} came before step(), after the first was voted with: "
                "with overlap=True put all backward passes but the last into no_sync(), and follow the last by step()"
            )
        ongoing.final.add(id(parameter))
        while ongoing.blocks and ongoing.ready(ongoing.blocks[-1]):
            self._leave(ongoing, optimizer.zeros, optimizer.t)

    def vote(self, segments: Sequence[Segment], statement: list[str], zeros: Zeros, step: int) -> None:
        """As `Exchange.vote`, of what is under way.

        Raises:
            RuntimeError: also if a gradient or a setting was changed since the backward pass, or is to be scaled now.
        """
        if not segments:
            return
        ongoing = self._ongoing or self._begin(list(segments), statement)
        self._ongoing = None
        try:
            self._check(ongoing, segments, statement)
        except RuntimeError:
            for ballots in ongoing.sent:
                ballots.wait()
            raise
        while ongoing.blocks:
            self._leave(ongoing, zeros, step)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        if ongoing.voted:
            self._tally_and_apply(ongoing.chosen, ongoing.sent, ongoing.who, zeros, step)
        self._close(ongoing.segments, ongoing.voted, step)

    def _begin(self, segments: list[Segment], statement: list[str]) -> _Vote:
        vote = _Vote(segments, *self._open(segments, statement), statement)
        vote.blocks = list(self._blocks(lay_out(vote.chosen)))
        return vote

    def _leave(self, vote: _Vote, zeros: Zeros, step: int) -> None:
        """Cast and send the next block, on a stream beside the backward pass' where there are streams."""
        block = vote.blocks.pop()
        covered = [segment for segment, _, _ in cover(vote.chosen, block.lo, block.hi)]
        with self._beside(covered):
            vote.sent.append(self._send_ballots(vote.chosen, block, zeros, step))

    def _beside(self, segments: Iterable[Segment]) -> contextlib.AbstractContextManager[object]:
        first, *_ = segments = list(segments)
        device = first.parameter.device
        if device.type != "cuda":
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        for segment in segments:
            if segment.present:
                segment.raw_gradient.record_stream(self._stream)  # DDP may free it once it is in its bucket
        return torch.cuda.stream(self._stream)

    def _note_versions_last(self) -> None:
        """After the backward pass, and after DDP's own last touch, which is queued behind this."""
        Variable._execution_engine.queue_callback(self._note_versions)

    def _note_versions(self) -> None:
        if self._ongoing is not None:
            gradients = {id(s.parameter): s.parameter.grad for s in self._ongoing.segments}
            self._ongoing.versions = {key: g._version for key, g in gradients.items() if g is not None}

    def _check(self, vote: _Vote, segments: Sequence[Segment], statement: list[str]) -> None:
        """Make sure that what was voted with is what is there now."""
        settings = [old for old, new in zip(vote.statement, statement, strict=False) if old != new]
        if settings:
            raise RuntimeError(
                f"{self.name} was changed after the vote had begun, in the backward pass ({settings[0]}): with "
                "overlap=True change settings before it or after step()"
            )
        if any(segment.inverse_scale is not None for segment in segments) and vote.final:
            raise RuntimeError(
                "overlap=True takes gradients as the backward pass leaves them, which a gradient scaler has multiplied:"
                " train in bfloat16 or without mixed precision, or leave out overlap"
            )
        for k in vote.voted:
            p = vote.segments[k].parameter
            if vote.segments[k].present and p.grad is None:
                raise RuntimeError(
                    f"overlap=True needs a gradient for every parameter, {self._name(p)} has none: leave out overlap"
                )
            if vote.versions is not None and p.grad is not None and p.grad._version != vote.versions.get(id(p)):
                raise RuntimeError(
                    f"the gradient of {self._name(p)} was changed between backward() and step(), after it was voted "
                    "with: overlap=True excludes clipping and whatever else changes gradients; leave out either"
                )

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter), "a parameter")


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def check_overlap(
    vote_between: VoteBetween,
    adversaries: Mapping[int, Adversary] | None,
    optimizers: int = 1,
    ddp_model: DistributedDataParallel | None = None,
) -> None:
    """Make sure that nothing was asked for that `overlap` excludes.

    Raises:
        ValueError: if something was.
    """
    excluded = {
        "vote_between='nodes'": vote_between == "nodes",
        "adversaries": bool(adversaries),
        f"{optimizers} optimizers": optimizers > 1,
        "find_unused_parameters=True": getattr(ddp_model, "find_unused_parameters", False),
        "static_graph=True": getattr(ddp_model, "static_graph", False),
    }
    found = [name for name, given in excluded.items() if given]
    if found:
        raise ValueError(f"overlap=True excludes {', '.join(found)}: leave out either")
