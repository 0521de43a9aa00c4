"""Ballots up, verdict down: one vote of all ranks over torch.distributed (steps 4-6)."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from signsgd_core import Zeros, planes
from signsgd_core.adversaries import Adversary
from signsgd_core.traffic import WORD_BITS

from . import kernels
from .agreement import Purpose, agree, describe, meet
from .kernels.cpu import packbits
from .peers import Message, Peers
from .segments import Segment, lay_out, momentum_dtype
from .statistics import VoteStatistics
from .verify import verify

WIRE_VERSION = 1
BLOCK_SIZE = 1 << 22
"""Coordinates whose ballots travel together: while they do, the next block is cast."""


class _Block(NamedTuple):
    lo: int
    hi: int  # coordinates [lo, hi) of the long vector
    shard_bytes: int  # of one plane


class _Ballots(NamedTuple):
    block: _Block
    sent: Tensor  # one row a teller: uint8 of shape (ranks, planes, shard bytes)
    received: Tensor  # of the same shape, one row a voter
    wait: Callable[[], None]  # until they are there


class Exchange:
    """One optimizer's vote among the ranks of a process group.

    All parameters are one long vector in blocks, each block in as many shards as there are ranks. Ballots travel up,
    each shard to the rank that is its teller, and verdicts down, each from its teller to all; a worker sends
    ``2·(M−1)/M·d`` bits (doubled by ``zeros="abstain"``), and before them 32 bytes by which all ranks make sure that
    they speak of the same model, settings and step.

    Args:
        process_group: of the ranks that vote.
        parameter_names: how to call a parameter in messages, by its id.
        name: of the optimizer, the same on all ranks.
        block_size: coordinates in a block; the verdict does not depend on it.

    Attributes:
        peers: the other workers, and the bytes sent to them.
        everyone: all ranks, where they are more than the workers.
        statistics: filled at each vote where not None.
        verify_every_n_steps: how often all ranks make sure that they are still the same; 0 for never.
        overlap: whether ballots leave in the backward pass.
        adversary: what this rank makes of its gradients before it votes; None for an honest one.
    """

    overlap = False

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        parameter_names: dict[int, str],
        name: str = "optimizer 0",
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self.peers = self.everyone = Peers(process_group)
        self.name, self.block_size = name, block_size
        self.statistics: VoteStatistics | None = None
        self.verify_every_n_steps = 0
        self.adversary: Adversary | None = None
        self._names = parameter_names

    def vote(self, segments: Sequence[Segment], statement: list[str], zeros: Zeros, step: int) -> None:
        """Take one step of every parameter by the majority's verdict.

        Args:
            segments: all parameters of the optimizer, also those without a gradient here.
            statement: the optimizer's settings, which must be the same on all ranks.
            zeros: the zero rule.
            step: `t`.

        Raises:
            PeerLostError: if a rank does not answer within the process group's timeout.
            RuntimeError: if the ranks disagree; then nothing was changed on any.
            RanksDifferError: if they are no longer the same, where that is looked at.
        """
        self.keep_own(segments)
        for segment in segments:
            if self.adversary is not None and segment.present:
                segment.lie(self.adversary)
        if not segments:
            return
        voted, present = self._open(segments, statement)
        if voted:
            self._step(segments, voted, present, zeros, step)
        self._close(segments, voted, step)

    def agree(self, segments: Sequence[Segment], statement: list[str], purpose: Purpose = Purpose.VOTE) -> Tensor:
        """Make sure that all ranks have the same parameters and settings.

        Returns:
            Which worker has a gradient for what, bool of shape (workers, segments).

        Raises:
            PeerLostError: if a rank does not answer within the process group's timeout.
            RuntimeError: if they differ, on all ranks, naming the first difference.
        """
        lines = [f"wire version {WIRE_VERSION}", f"{self.name}: block_size={self.block_size}, overlap={self.overlap}"]
        lines += statement
        lines += [describe(self._names.get(id(s.parameter), "a parameter"), s.parameter) for s in segments]
        here = torch.tensor([segment.present for segment in segments], dtype=torch.bool)
        return agree(self.everyone, lines, here, self.everyone.wire(segments[0].parameter.device), purpose)

    def traffic(self) -> tuple[int, float]:
        """Return how many bytes of payload this rank has sent to other workers, and how many seconds it has waited."""
        return self.peers.sent_bytes, self.peers.waited_seconds

    def gather_counts(self, row: Tensor) -> Tensor:
        """Return what each worker counted, of what each rank did: shape (workers, counts), on the CPU."""
        wire = self.everyone.wire(row.device)
        meet(self.everyone, Purpose.FIGURES, wire)
        return self.everyone.gather(row.to(wire), Message.FIGURES).cpu()

    def keep_own(self, segments: Sequence[Segment]) -> None:
        """Of momenta that are whole, as those that were loaded are, keep what this rank votes with: here all."""

    def momenta(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Iterator[Tensor | None]:
        """Yield this worker's momenta on its first rank, None on its others; all of its ranks must go through them.

        Args:
            segments: all parameters of the optimizer.
            wanted: the numbers of those whose momentum is wanted, zeros where there is none.
        """
        for k in wanted:
            p = segments[k].parameter
            momentum = segments[k].state.get(p, {}).get("momentum")
            dtype = momentum_dtype(segments[k].group)
            yield torch.zeros(p.shape, dtype=dtype, device=p.device) if momentum is None else momentum

    def _open(self, segments: Sequence[Segment], statement: list[str]) -> tuple[list[int], Tensor]:
        """Return the numbers of the segments that some worker has a gradient for, and who has, as `agree` does."""
        present = self.agree(segments, statement)
        voted = present.any(0).nonzero().flatten().tolist()
        if self.statistics is not None:
            self.statistics.begin([id(segments[k].parameter) for k in voted])
        return voted, present

    def _close(self, segments: Sequence[Segment], voted: list[int], step: int) -> None:
        """Finish what was voted on, and look at times whether the ranks are still the same."""
        for k in voted:
            segments[k].finish()
        if self.verify_every_n_steps and (step + 1) % self.verify_every_n_steps == 0:
            shared = [(self._names.get(id(s.parameter), "a parameter"), s.shared()) for s in segments]
            verify(self.everyone, shared, step)

    def _step(self, segments: Sequence[Segment], voted: list[int], present: Tensor, zeros: Zeros, step: int) -> None:
        """Vote on those segments of which some worker has a gradient."""
        self._run([segments[k] for k in voted], present[:, voted], zeros, step)

    def _run(self, segments: list[Segment], who: Tensor, zeros: Zeros, step: int) -> None:
        """Cast, tally and apply, block by block; every block is under way before the first is waited for."""
        up = [self._send_ballots(segments, block, zeros, step) for block in self._blocks(lay_out(segments))]
        self._tally_and_apply(segments, up, who, zeros, step)

    def _send_ballots(self, segments: list[Segment], block: _Block, zeros: Zeros, step: int) -> _Ballots:
        """Cast a block's ballots and send them on their way."""
        ballots = self._cast(segments, block, zeros, step)
        received = torch.zeros_like(ballots)  # what a rank leaves out counts as its own zeros, never as old memory
        return _Ballots(block, ballots, received, self.peers.swap(ballots, received, Message.BALLOTS))

    def _tally_and_apply(
        self, segments: list[Segment], up: list[_Ballots], who: Tensor, zeros: Zeros, step: int
    ) -> None:
        """Count what arrives, send the verdicts of this rank's shards, and apply everybody's."""
        peers, count, present = self.peers, planes(zeros), None if who.all() else who
        teller = kernels.for_device(peers.wire(segments[0].parameter.device))
        down = []
        for block, _, received, wait in up:
            wait()
            shard = 8 * block.shard_bytes
            masks = self._masks(segments, present, block.lo + peers.rank * shard, shard)
            verdict = teller.verdict(received, zeros, step, masks)
            everyone = torch.zeros_like(received)
            wait = peers.swap(verdict.expand_as(everyone), everyone, Message.VERDICTS)
            down.append((block, everyone, wait, verdict))  # the verdict stays alive until it is sent
            if self.statistics is not None:
                length = min(max(block.hi - block.lo - peers.rank * shard, 0), shard)
                self.statistics.count_tally(teller, received, masks, length)
        for (block, ballots, _, _), (_, everyone, wait, _) in zip(up, down, strict=True):
            wait()
            bits = everyone.transpose(0, 1).reshape(count, -1)
            self._apply(segments, block, bits)
            if self.statistics is not None:
                own = ballots.transpose(0, 1).reshape(count, -1)
                here = None if present is None else present[peers.rank : peers.rank + 1]
                mask = self._masks(segments, here, block.lo, 8 * bits.shape[-1])
                self.statistics.count_verdict(teller, block.lo, block.hi - block.lo, own, bits, mask)

    def _blocks(self, length: int) -> Iterator[_Block]:
        unit = WORD_BITS * self.peers.world_size
        size = unit * -(-self.block_size // unit)
        for lo in range(0, length, size):
            hi = min(lo + size, length)
            yield _Block(lo, hi, WORD_BITS // 8 * -(-(hi - lo) // unit))

    def _cast(self, segments: list[Segment], block: _Block, zeros: Zeros, step: int) -> Tensor:
        """Return this rank's ballots of a block, one row a teller: uint8 of shape (ranks, planes, shard bytes)."""
        ranks, device = self.peers.world_size, segments[0].parameter.device
        kernel = kernels.for_device(device)
        ballot = torch.zeros(planes(zeros), ranks * block.shard_bytes, dtype=torch.uint8, device=device)
        note = None if self.statistics is None else self.statistics.count_gradient
        kernel.cast(segments, block.lo, block.hi, zeros, step, self.peers.rank, ballot, note)
        return ballot.view(len(ballot), ranks, -1).transpose(0, 1).contiguous().to(self.peers.wire(device))

    def _apply(self, segments: list[Segment], block: _Block, bits: Tensor) -> None:
        """Move the parameters by a block's verdict, uint8 of shape (planes, bytes)."""
        device = segments[0].parameter.device
        kernels.for_device(device).apply(segments, block.lo, block.hi, bits.to(device))

    def _masks(self, segments: list[Segment], present: Tensor | None, first: int, length: int) -> Tensor | None:
        """Return who votes where in [first, first + length): uint8 of shape (rows, ⌈length/8⌉); None for all."""
        if present is None:
            return None
        votes = torch.ones(len(present), length, dtype=torch.bool)
        for k, segment in enumerate(segments):
            a, b = max(segment.start - first, 0), min(segment.stop - first, length)
            if a < b:
                votes[:, a:b] = present[:, k : k + 1]
        return packbits(votes).to(self.peers.wire(segments[0].parameter.device))
