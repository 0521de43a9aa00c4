"""Who votes with whom: every rank is a worker, or all ranks of a node are one together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from signsgd_core import Zeros, default_zeros
from signsgd_core.wire import WORD_BITS

from ..state import Entry, private
from ..views import FlatView, cover, lay_out
from .nodes import Groups, Slice, cut
from .transport import Message, PointToPoint

Note = Callable[[Tensor], None]
"""Is shown every gradient of this rank as it came."""


@dataclass
class Verdict:
    """What all ranks are to apply: the bits of some views, laid out one behind the other.

    Attributes:
        views: laid out.
        bits: uint8 of shape (planes, bytes).
    """

    views: list[FlatView]
    bits: Tensor


@dataclass
class Share:
    """What this rank votes on in one step.

    Attributes:
        moved: all parameters that the vote will move.
        views: of the share; may be none.
        present: which worker has a gradient for which of them, bool of shape (workers, views).
        spread: from the verdict of this share, None if it is empty, to all that this rank is to apply.
    """

    moved: list[FlatView]
    views: list[FlatView]
    present: Tensor
    spread: Callable[[Tensor | None, int], list[Verdict]]


class Topology(ABC):
    """Which ranks are one worker, and how their gradients and verdicts meet.

    Attributes:
        workers: those that ballots are swapped with: this rank's counterparts on the other workers. Its ranks are the
            numbers of the workers.
        everyone: all ranks.
        ranks_per_worker: how many ranks are one worker.
        changes: whether workers come and go.
    """

    workers: PointToPoint
    everyone: PointToPoint
    ranks_per_worker: int
    changes = False

    @property
    def zeros(self) -> Zeros:
        """The zero rule where none is chosen; the last worker that is left keeps that of several."""
        return default_zeros(2 if self.changes else self.workers.world_size)

    @abstractmethod
    def share(self, views: Sequence[FlatView], present: Tensor, bucket_size: int, note: Note | None) -> Share:
        """Return what this rank votes on, with its worker's gradient; `keep_share` comes before it.

        Args:
            views: all parameters of the optimizer.
            present: which rank has a gradient for what, bool of shape (ranks, views); some rank has one for something.
            bucket_size: coordinates that travel together.
            note: is shown gradients, where the topology takes them.
        """

    @abstractmethod
    def traffic(self) -> tuple[int, float]:
        """Return the bytes of payload that this rank has sent to other workers, and its worker's seconds of waiting."""

    def by_worker(self, rows: Tensor) -> Tensor:
        """Return rows of ranks as rows of workers, the sum of each worker's."""
        return rows.view(self.workers.world_size, self.ranks_per_worker, *rows.shape[1:]).sum(1)

    def side_by_side(self, rows: Tensor) -> Tensor:
        """Return what each rank has, shape (ranks, tensors, …), with all that must be equal in one column."""
        return rows

    def rank_of(self, row: int, place: int) -> int:
        """Return which rank has a row of `side_by_side`, in the so many-th block of columns."""
        return row

    def _between_workers(self, *inside: PointToPoint) -> tuple[int, float]:
        """Return the bytes to other workers, and this rank's part of its worker's seconds.

        Args:
            *inside: what joins the ranks of a worker.
        """
        ranks, own = self.everyone.world_size, self.ranks_per_worker
        headers = self.everyone.sent_bytes // (ranks - 1) * (ranks - own)  # the same to every rank
        waited = sum(transport.waited_seconds for transport in (self.workers, self.everyone, *inside))
        return self.workers.sent_bytes + headers, waited / own

    @abstractmethod
    def keep_share(self, views: Sequence[FlatView]) -> None:
        """Of private state that is whole, as what was loaded is, keep what this rank votes with."""

    def whole(self, views: Sequence[FlatView], wanted: Sequence[tuple[int, Entry]]) -> Iterator[Tensor | None]:
        """Yield a worker's private state on its first rank, None on its others; all of its ranks must go through it.

        Args:
            views: all parameters of the optimizer.
            wanted: the number of a parameter and an entry each; zeros where there is none.
        """
        for k, entry in wanted:
            p, group = views[k].parameter, views[k].group
            value = views[k].state.get(p, {}).get(entry.name)
            yield torch.zeros(p.shape, dtype=entry.dtype(group), device=p.device) if value is None else value


class Flat(Topology):
    """Every rank is a worker.

    Args:
        ranks: all of them.
        changes: whether they come and go.
    """

    ranks_per_worker = 1

    def __init__(self, ranks: PointToPoint, changes: bool = False) -> None:
        self.workers = self.everyone = ranks
        self.changes = changes

    def share(self, views: Sequence[FlatView], present: Tensor, bucket_size: int, note: Note | None) -> Share:
        """Return all parameters that some rank has a gradient for."""
        voted = present.any(0).nonzero().flatten().tolist()
        chosen = [views[k] for k in voted]

        def spread(bits: Tensor | None, planes: int) -> list[Verdict]:
            return [] if bits is None else [Verdict(chosen, bits)]

        return Share(chosen, chosen, present[:, voted], spread)

    def traffic(self) -> tuple[int, float]:
        """Return this rank's bytes and seconds."""
        return self.workers.sent_bytes, self.workers.waited_seconds

    def keep_share(self, views: Sequence[FlatView]) -> None:
        """Keep all."""


class Nodes(Topology):
    r"""A node is one worker.

    .. math::
        g_i = \frac{1}{L} \sum_{l<L} g_{i,l}, \quad V = \mathrm{majority}_i(\mathrm{sign}\, c_i)

    where ``g_{i,l}`` is the gradient of rank `l` of node `i`. Every parameter group is cut into `L` shares. Inside a
    node each rank gets the float32 mean for its share, keeps the node's momentum there, and votes there with the ranks
    of the same place in the other nodes. Then the verdicts, one bit a coordinate, are gathered inside the node and
    every rank applies all of them: the same bits as if parameters had been gathered, at a 32nd of the bytes.

    A node sends the others ``2·(N−1)/N·d`` bits, as one worker does, and 32 bytes for each pair of ranks. An entry that
    is not finite on a rank counts as 0 in the mean, a rank without a gradient for a parameter adds 0, and the node
    abstains where none of its ranks has one.

    Args:
        groups: what `find_nodes` returned.

    Attributes:
        inside: the ranks of this node.
    """

    def __init__(self, groups: Groups) -> None:
        self.everyone = PointToPoint(groups.everyone)
        self.workers = PointToPoint(groups.counterparts, groups.everyone)
        self.inside = PointToPoint(groups.inside, groups.everyone)
        self.ranks_per_worker = self.inside.world_size

    def share(self, views: Sequence[FlatView], present: Tensor, bucket_size: int, note: Note | None) -> Share:
        """Average the gradients of the node and return this rank's share."""
        by_node, device = self.by_worker(present).bool(), views[0].parameter.device
        voted = by_node.any(0).nonzero().flatten().tolist()
        chosen = {k for k in voted if views[k].parameter.numel()}
        shares = [[s for s in share if s.number in chosen] for share in cut(views, self.inside.world_size)]
        slices = [[views[k].slice(first, last) for k, first, last in share] for share in shares]
        lengths = [lay_out(part) for part in slices]
        mean = self._average(slices, max(lengths), device, bucket_size, note)
        numbers, place = [s.number for s in shares[self.inside.rank]], self.workers.rank
        own = [
            self._own(views[k], part, mean[part.start : part.stop], bool(by_node[place, k]))
            for k, part in zip(numbers, slices[self.inside.rank], strict=True)
        ]

        def spread(bits: Tensor | None, planes: int) -> list[Verdict]:
            width = WORD_BITS // 8 * -(-max(lengths) // WORD_BITS)
            row = torch.zeros(planes, width, dtype=torch.uint8, device=self.inside.wire(device))
            if bits is not None:
                row[:, : bits.shape[1]] = bits[:, :width]
            rows = self.inside.gather(row, Message.NODE_VERDICTS)
            return [Verdict(part, bits) for part, bits in zip(slices, rows, strict=True) if part]

        return Share([views[k] for k in voted], own, by_node[:, numbers], spread)

    def traffic(self) -> tuple[int, float]:
        """Return the bytes between nodes; the seconds are this rank's part of the node's mean."""
        return self._between_workers(self.inside)

    def keep_share(self, views: Sequence[FlatView]) -> None:
        """Keep this rank's share.

        Raises:
            RuntimeError: if something is neither whole nor the share; then nothing was changed.
        """
        slices = {s.number: s for s in cut(views, self.inside.world_size)[self.inside.rank]}
        held = []
        for k, view in enumerate(views):
            entries, shape = view.state.get(view.parameter, {}), view.parameter.shape
            own = slices.get(k, Slice(k, 0, 0))
            for name in [entry.name for entry in private(view.group) if entry.name in entries]:
                if entries[name].numel() not in (own.size, shape.numel()):
                    raise RuntimeError(
                        f"the {name} of a parameter of shape {tuple(shape)} must have {own.size} coordinates on this "
                        f"rank, or all {shape.numel()}, got {entries[name].numel()}: load what gather_state returned, "
                        "by scatter_state, rather than the state_dict() of another rank"
                    )
                held.append((entries, name, own))
        for entries, name, own in held:
            if own.size == 0:
                del entries[name]
            elif entries[name].numel() != own.size:
                entries[name] = entries[name].reshape(-1)[own.first : own.last].clone()

    def whole(self, views: Sequence[FlatView], wanted: Sequence[tuple[int, Entry]]) -> Iterator[Tensor | None]:
        """Yield the node's state, put together from the shares of its ranks."""
        self.keep_share(views)
        lengths = [[0] * self.inside.world_size for _ in views]
        for place, share in enumerate(cut(views, self.inside.world_size)):
            for s in share:
                lengths[s.number][place] = s.size
        for k, entry in wanted:
            p, group = views[k].parameter, views[k].group
            row = torch.zeros(max(lengths[k]), dtype=entry.dtype(group), device=p.device)
            value = views[k].state.get(p, {}).get(entry.name)
            if value is not None:
                row[: value.numel()] = value.view(-1)
            rows = self.inside.collect(row.to(self.inside.wire(p.device)), Message.NODE_STATE)
            if rows is None:
                yield None
            else:
                yield torch.cat([row[:length] for row, length in zip(rows, lengths[k], strict=True)]).view(p.shape)

    def _own(self, view: FlatView, part: FlatView, mean: Tensor, present: bool) -> FlatView:
        """Return a slice with the node's state and mean gradient; the optimizer keeps the state for the slice."""
        kept = view.state.get(view.parameter, {})
        entries = {entry.name: kept[entry.name].view(-1) for entry in private(view.group) if entry.name in kept}
        own = FlatView(part.parameter, part.group, {part.parameter: entries}, present, sent=mean, shape=part.shape)
        for entry in private(view.group):
            view.state[view.parameter][entry.name] = entry.of(entries, part.parameter, part.group)
        return own

    def _average(
        self, slices: list[list[FlatView]], longest: int, device: torch.device, bucket_size: int, note: Note | None
    ) -> Tensor:
        """Return the mean of the node's gradients for this rank's share, float32 of shape (longest,).

        A bucket travels while the next is gathered from the gradients.

        Args:
            slices: laid out, of every rank's share.
            longest: the length of the longest share.
            device: of the gradients.
            bucket_size: coordinates that travel together.
            note: is shown every gradient.
        """
        mean = torch.empty(longest, dtype=torch.float32, device=device)
        size = -(-bucket_size // len(slices))
        buckets = [(lo, min(lo + size, longest)) for lo in range(0, longest, size)]
        sent = (self._send(slices, lo, hi, device, note) for lo, hi in buckets)
        ahead = next(sent, None)
        for lo, hi in buckets:
            assert ahead is not None
            (wait, received), ahead = ahead, next(sent, None)
            wait()
            mean[lo:hi] = received.sum(0) / len(slices)
        return mean

    def _send(
        self, slices: list[list[FlatView]], lo: int, hi: int, device: torch.device, note: Note | None
    ) -> tuple[Callable[[], None], Tensor]:
        """Start to swap gradients in [lo, hi) of the shares; return what waits for them, and where they will be."""
        rows = torch.zeros(len(slices), hi - lo, dtype=torch.float32, device=device)
        for row, share in zip(rows, slices, strict=True):
            for part, a, b in cover(share, lo, hi):
                if part.present:
                    gradient = part.gradient(a, b)
                    if note is not None:
                        note(gradient)
                    place = row[part.start + a - lo : part.start + b - lo]
                    torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0, out=place)
        rows = rows.to(self.inside.wire(rows.device))
        received = torch.empty_like(rows)
        return self.inside.swap(rows, received, Message.MEAN), received
