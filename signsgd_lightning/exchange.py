"""Ballots up, verdict down: one vote of all ranks over torch.distributed (steps 4-6)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from signsgd_core import Zeros, planes
from signsgd_core.adversaries import Adversary
from signsgd_core.traffic import WORD_BITS

from . import kernels
from .agreement import agree, describe
from .kernels.cpu import packbits
from .peers import Peers
from .segments import Segment, cover, lay_out
from .statistics import VoteStatistics
from .use import Use
from .verify import verify

WIRE_VERSION = 1
BLOCK_SIZE = 1 << 22
"""Coordinates whose ballots travel together: while they do, the next block is cast."""


class _Block(NamedTuple):
    lo: int
    hi: int  # coordinates [lo, hi) of the long vector
    shard_bytes: int  # of one plane


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
        peers: the other ranks, and the bytes sent to them.
        statistics: filled at each vote where not None.
        use: which gradients are real, where DDP hides it; else None.
        verify_every_n_steps: how often all ranks make sure that they are still the same; 0 for never.
        adversary: what this rank makes of its gradients before it votes; None for an honest one.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        parameter_names: dict[int, str],
        name: str = "optimizer 0",
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self.peers = Peers(process_group)
        self.name, self.block_size = name, block_size
        self.statistics: VoteStatistics | None = None
        self.use: Use | None = None
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
        for segment in segments:
            segment.present = segment.present and (self.use is None or segment.parameter in self.use)
            if self.adversary is not None and segment.present:
                segment.lie(self.adversary)
        if not segments:
            return
        present = self.agree(segments, statement)
        voted = [k for k in range(len(segments)) if present[:, k].any()]
        if voted:
            present = present[:, voted]
            self._run([segments[k] for k in voted], None if present.all() else present, zeros, step)
        if self.use is not None:
            self.use.forget()
        if self.verify_every_n_steps and (step + 1) % self.verify_every_n_steps == 0:
            shared = [(self._names.get(id(s.parameter), "a parameter"), s.shared()) for s in segments]
            verify(self.peers, shared, step)

    def agree(self, segments: Sequence[Segment], statement: list[str]) -> Tensor:
        """Make sure that all ranks have the same parameters and settings.

        Returns:
            Who has a gradient for what, bool of shape (ranks, segments).

        Raises:
            PeerLostError: if a rank does not answer within the process group's timeout.
            RuntimeError: if they differ, on all ranks, naming the first difference.
        """
        lines = [f"wire version {WIRE_VERSION}", f"{self.name}: block_size={self.block_size}", *statement]
        lines += [describe(self._names.get(id(s.parameter), "a parameter"), s.parameter) for s in segments]
        here = torch.tensor([segment.present for segment in segments], dtype=torch.bool)
        return agree(self.peers, lines, here, self.peers.wire(segments[0].parameter.device))

    def _run(self, segments: list[Segment], present: Tensor | None, zeros: Zeros, step: int) -> None:
        """Cast, tally and apply, block by block; every block is under way before the first is waited for."""
        peers, count = self.peers, planes(zeros)
        teller = kernels.for_device(peers.wire(segments[0].parameter.device))
        if self.statistics is not None:
            self.statistics.begin([id(segment.parameter) for segment in segments])
        up, down = [], []
        for block in self._blocks(lay_out(segments)):
            ballots = self._cast(segments, block, zeros, step)
            received = torch.zeros_like(ballots)  # what a rank leaves out counts as its own zeros, never as old memory
            up.append((block, ballots, received, peers.swap(ballots, received, "sent ballots")))
        for block, _, received, wait in up:
            wait()
            shard = 8 * block.shard_bytes
            masks = self._masks(segments, present, block.lo + peers.rank * shard, shard)
            verdict = teller.verdict(received, zeros, step, masks)
            everyone = torch.zeros_like(received)
            wait = peers.swap(verdict.expand_as(everyone), everyone, "sent verdicts")
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
        for segment in segments:
            segment.finish()

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
        chunk = min(kernel.CHUNK, block.hi - block.lo)
        staging = torch.empty(chunk, device=device)
        for lo in range(block.lo, block.hi, chunk):
            hi = min(lo + chunk, block.hi)
            for segment, a, b in cover(segments, lo, hi):
                place = staging[segment.start + a - lo : segment.start + b - lo]
                if not segment.present:
                    place.zero_()  # masked by the teller
                    continue
                c, gradient = segment.directions(a, b)
                place.copy_(c)
                if self.statistics is not None:
                    self.statistics.count_gradient(gradient)
            out = ballot[:, (lo - block.lo) // 8 : -(-(hi - block.lo) // 8)]
            kernel.pack(staging[: hi - lo], zeros, step, self.peers.rank, out)
        return ballot.view(len(ballot), ranks, -1).transpose(0, 1).contiguous().to(self.peers.wire(device))

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

    def _apply(self, segments: list[Segment], block: _Block, bits: Tensor) -> None:
        device = segments[0].parameter.device
        kernel, bits = kernels.for_device(device), bits.to(device)
        chunk = min(kernel.CHUNK, block.hi - block.lo)
        for lo in range(block.lo, block.hi, chunk):
            hi = min(lo + chunk, block.hi)
            verdict = kernel.unpack(bits[:, (lo - block.lo) // 8 :], hi - lo)
            for segment, a, b in cover(segments, lo, hi):
                segment.apply(a, b, verdict[segment.start + a - lo : segment.start + b - lo])
