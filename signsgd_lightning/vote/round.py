"""One vote under way: buckets of ballots up, tallies, verdicts down (steps 4-6)."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from signsgd_core import Zeros, planes
from signsgd_core.wire import WORD_BITS, shard_bytes

from .. import kernels
from ..kernels.cpu import packbits
from ..polar import orthogonalize
from ..views import cover, lay_out
from .observers import Observer, note_for
from .topology import Share
from .transport import Message, PointToPoint


class Bucket(NamedTuple):
    """Coordinates [lo, hi) of the long vector, whose ballots travel together, and the bytes of one plane of a shard."""

    lo: int
    hi: int
    shard_bytes: int


class _Sent(NamedTuple):
    bucket: Bucket
    ballots: Tensor  # uint8 of shape (workers, planes, shard bytes), a row for each owner of a shard
    received: Tensor  # of the same shape, a row from each worker
    wait: Callable[[], None]  # until they are there


class Round:
    """One vote on a share of the parameters.

    The share is one long vector in buckets, each bucket in as many shards as there are workers. Ballots travel up, each
    shard to the worker that owns it, and verdicts down, each from its owner to all: ``2·(M−1)/M·d`` bits a worker,
    doubled by ``zeros="abstain"``. Nothing that is the same on all workers changes here.

    Args:
        workers: among whom ballots travel.
        share: what is voted on.
        zeros: the zero rule.
        step: `t`.
        bucket_size: coordinates in a bucket.
        observers: are told.

    Attributes:
        waiting: the buckets that are not sent yet, in order.
    """

    def __init__(
        self,
        workers: PointToPoint,
        share: Share,
        zeros: Zeros,
        step: int,
        bucket_size: int,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.workers, self.share, self.zeros, self.step, self.observers = workers, share, zeros, step, observers
        self.waiting = list(_buckets(lay_out(share.views), workers.world_size, bucket_size))
        last = self.waiting[-1]
        self._bytes = last.lo // 8 + workers.world_size * last.shard_bytes
        self._sent: list[_Sent] = []
        self._cast = list(share.views)  # what ballots are cast from: polar factors take their places in it
        self._note = note_for(observers)
        self._present = None if share.present.all() else share.present

    def send(self, bucket: Bucket) -> None:
        """Cast this worker's ballots of a bucket and send them on their way."""
        self.waiting.remove(bucket)
        covered = [k for k, view in enumerate(self._cast) if view.start < bucket.hi and view.stop > bucket.lo]
        self._tell_gradients(bucket)
        orthogonalize(self._cast, covered)
        workers, device = self.workers.world_size, self._device
        ballot = torch.zeros(planes(self.zeros), workers * bucket.shard_bytes, dtype=torch.uint8, device=device)
        kernels.for_device(device).cast(
            self._cast, bucket.lo, bucket.hi, self.zeros, self.step, self.workers.rank, ballot
        )
        for k in covered:
            if bucket.lo <= self._cast[k].start and self._cast[k].stop <= bucket.hi:
                self._cast[k] = self.share.views[k]  # a polar factor is not needed any more
        rows = ballot.view(len(ballot), workers, -1).transpose(0, 1).contiguous().to(self.workers.wire(device))
        received = torch.zeros_like(rows)  # what a worker leaves out counts as its own zeros, never as old memory
        self._sent.append(_Sent(bucket, rows, received, self.workers.swap(rows, received, Message.BALLOTS)))

    def wait_for_ballots(self) -> None:
        """Wait for what is under way, where nothing will come of it."""
        for sent in self._sent:
            sent.wait()

    def decide(self) -> Tensor:
        """Count the ballots of this worker's shards, send their verdicts, and wait for everybody's.

        Returns:
            The verdict, uint8 of shape (planes, bytes), on the device that the bytes travel from.

        Raises:
            PeerLostError: if a worker does not answer.
        """
        rank, kernel = self.workers.rank, kernels.for_device(self.workers.wire(self._device))
        down = []
        for bucket, _, received, wait in self._sent:
            wait()
            length = 8 * bucket.shard_bytes
            masks = self._masks(self._present, bucket.lo + rank * length, length)
            verdict = kernel.verdict(received, self.zeros, self.step, masks)
            everyone = torch.zeros_like(received)
            wait = self.workers.swap(verdict.expand_as(everyone), everyone, Message.VERDICTS)
            down.append((everyone, wait, verdict))  # the verdict stays alive until it is sent
            for observer in self.observers:
                real = min(max(bucket.hi - bucket.lo - rank * length, 0), length)
                observer.tally(kernel, received, masks, real)
        bits = torch.empty(planes(self.zeros), self._bytes, dtype=torch.uint8, device=down[0][0].device)
        for sent, (everyone, wait, _) in zip(self._sent, down, strict=True):
            wait()
            workers, count, width = everyone.shape
            part = bits[:, sent.bucket.lo // 8 :][:, : workers * width]
            part.view(count, workers, width).copy_(everyone.transpose(0, 1))
            self._tell(kernel, sent, part)
        return bits

    def _tell_gradients(self, bucket: Bucket) -> None:
        """Show the observers this rank's gradients of a bucket, before they are taken into a ballot."""
        if self._note is None:
            return
        size = kernels.for_device(self._device).TILE
        for view, a, b in cover(self.share.views, bucket.lo, bucket.hi):
            for i in range(a, b, size) if view.present else ():
                self._note(view.gradient(i, min(i + size, b)))

    def _tell(self, kernel: kernels.Kernel, sent: _Sent, bits: Tensor) -> None:
        """Tell the observers of a bucket's verdict."""
        if not self.observers:
            return
        own, bits = sent.ballots.transpose(0, 1).reshape(len(bits), -1), bits.contiguous()
        rank, lo = self.workers.rank, sent.bucket.lo
        mask = self._masks(None if self._present is None else self._present[rank : rank + 1], lo, 8 * bits.shape[-1])
        for observer in self.observers:
            observer.verdict(kernel, lo, sent.bucket.hi - lo, own, bits, mask)

    @property
    def _device(self) -> torch.device:
        return self.share.views[0].parameter.device

    def _masks(self, present: Tensor | None, first: int, length: int) -> Tensor | None:
        """Return who votes where in [first, first + length): uint8 of shape (rows, ⌈length/8⌉); None for all."""
        if present is None:
            return None
        votes = torch.ones(len(present), length, dtype=torch.bool, device="cpu")
        for k, view in enumerate(self.share.views):
            a, b = max(view.start - first, 0), min(view.stop - first, length)
            if a < b:
                votes[:, a:b] = present[:, k : k + 1]
        return packbits(votes).to(self.workers.wire(self._device))


def _buckets(length: int, workers: int, bucket_size: int) -> Iterator[Bucket]:
    unit = WORD_BITS * workers
    size = unit * -(-bucket_size // unit)
    for lo in range(0, length, size):
        hi = min(lo + size, length)
        yield Bucket(lo, hi, shard_bytes(hi - lo, workers))
