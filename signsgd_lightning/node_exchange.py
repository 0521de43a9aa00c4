"""The vote between nodes: a node averages its ranks' gradients, each rank votes for its shard, all apply it."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from signsgd_core import Zeros, planes
from signsgd_core.traffic import WORD_BITS

from . import kernels
from .agreement import Purpose
from .exchange import BLOCK_SIZE, Exchange, _Block
from .nodes import Nodes, Piece, cut
from .peers import Message, Peers
from .segments import Segment, cover, lay_out, momentum_dtype


class NodeExchange(Exchange):
    r"""One optimizer's vote among nodes, each of which is one worker.

    .. math::
        g_i = \frac{1}{L} \sum_{l<L} g_{i,l}, \quad V = \mathrm{majority}_i(\mathrm{sign}\, c_i)

    where ``g_{i,l}`` is the gradient of rank `l` of node `i`. Every parameter group is cut into `L` shards. Inside a
    node each rank gets the float32 mean for its shard, keeps the node's momentum there, and votes there with the ranks
    of the same place in the other nodes. Then the verdicts, one bit a coordinate, are gathered inside the node and
    every rank applies all of them: the exact same parameters and verdict momentum as if they had been gathered, at a
    32nd of the bytes.

    A node sends the others ``2·(N−1)/N·d`` bits, as one worker does, and 32 bytes for each pair of ranks. An entry that
    is not finite on a rank counts as 0 in the mean, a rank without a gradient for a parameter adds 0, and the node
    abstains where none of its ranks has one.

    Args:
        nodes: as `find_nodes` has them.
        parameter_names: how to call a parameter in messages, by its id.
        name: of the optimizer, the same on all ranks.
        block_size: coordinates in a block; the verdict does not depend on it.

    Attributes:
        peers: this rank's counterparts on the other nodes; their numbers are those of the nodes.
        inside: the ranks of this node.
        everyone: all ranks.
    """

    def __init__(
        self,
        nodes: Nodes,
        parameter_names: dict[int, str],
        name: str = "optimizer 0",
        block_size: int = BLOCK_SIZE,
    ) -> None:
        super().__init__(nodes.everyone, parameter_names, name, block_size)
        self.peers = Peers(nodes.counterparts, nodes.everyone)
        self.inside = Peers(nodes.inside, nodes.everyone)

    def agree(self, segments: Sequence[Segment], statement: list[str], purpose: Purpose = Purpose.VOTE) -> Tensor:
        """As `Exchange.agree`, among all ranks; a node has a gradient where any of its ranks has one."""
        present = super().agree(segments, statement, purpose)
        return present.view(self.peers.world_size, self.inside.world_size, -1).any(1)

    def traffic(self) -> tuple[int, float]:
        """As `Exchange.traffic`: bytes between nodes; seconds are this rank's part of the node's mean."""
        ranks, own = self.everyone.world_size, self.inside.world_size
        headers = self.everyone.sent_bytes // (ranks - 1) * (ranks - own)  # the same to every rank
        waited = sum(peers.waited_seconds for peers in (self.peers, self.inside, self.everyone))
        return self.peers.sent_bytes + headers, waited / own

    def gather_counts(self, row: Tensor) -> Tensor:
        """As `Exchange.gather_counts`: a node's ranks together."""
        rows = super().gather_counts(row)
        return rows.view(self.peers.world_size, self.inside.world_size, -1).sum(1)

    def keep_own(self, segments: Sequence[Segment]) -> None:
        """As `Exchange.keep_own`: this rank's shard.

        Raises:
            RuntimeError: if a momentum is neither whole nor the shard's; then nothing was changed.
        """
        pieces = {piece.number: piece for piece in cut(segments, self.inside.world_size)[self.inside.rank]}
        held = []
        for k, segment in enumerate(segments):
            momentum = segment.state.get(segment.parameter, {}).get("momentum")
            if momentum is None:
                continue
            piece, shape = pieces.get(k, Piece(k, 0, 0)), segment.parameter.shape
            if momentum.numel() not in (piece.size, shape.numel()):
                raise RuntimeError(
                    f"the momentum of a parameter of shape {tuple(shape)} must have {piece.size} coordinates on this "
                    f"rank, or all {shape.numel()}, got {momentum.numel()}: load what gather_state returned, by "
                    "scatter_state, rather than the state_dict() of another rank"
                )
            held.append((segment.state[segment.parameter], piece))
        for state, piece in held:
            if piece.size == 0:
                del state["momentum"]
            elif state["momentum"].numel() != piece.size:
                state["momentum"] = state["momentum"].reshape(-1)[piece.first : piece.last].clone()

    def momenta(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Iterator[Tensor | None]:
        """As `Exchange.momenta`, put together from the shards of the node's ranks."""
        self.keep_own(segments)
        lengths = [[0] * self.inside.world_size for _ in segments]
        for place, shard in enumerate(cut(segments, self.inside.world_size)):
            for piece in shard:
                lengths[piece.number][place] = piece.size
        for k in wanted:
            p, group = segments[k].parameter, segments[k].group
            row = torch.zeros(max(lengths[k]), dtype=momentum_dtype(group), device=p.device)
            momentum = segments[k].state.get(p, {}).get("momentum")
            if momentum is not None:
                row[: momentum.numel()] = momentum.view(-1)
            rows = self.inside.collect(row.to(self.inside.wire(p.device)), Message.NODE_MOMENTA)
            if rows is None:
                yield None
            else:
                yield torch.cat([row[:length] for row, length in zip(rows, lengths[k], strict=True)]).view(p.shape)

    def _step(self, segments: Sequence[Segment], voted: list[int], present: Tensor, zeros: Zeros, step: int) -> None:
        """Average, vote on this rank's shard, gather the verdicts of the node's shards and apply them."""
        chosen, device = set(voted), segments[0].parameter.device
        shards = cut(segments, self.inside.world_size)
        shards = [[piece for piece in shard if piece.number in chosen] for shard in shards]
        parts = [[segments[k].part(first, last) for k, first, last in shard] for shard in shards]
        lengths = [lay_out(shard) for shard in parts]
        mean = self._average(parts, max(lengths))
        own, numbers = [], [piece.number for piece in shards[self.inside.rank]]
        for k, part in zip(numbers, parts[self.inside.rank], strict=True):
            here = bool(present[self.peers.rank, k])
            own.append(self._own(segments[k], part, mean[part.start : part.stop], here))
        width = WORD_BITS // 8 * -(-max(lengths) // WORD_BITS)
        self._bits = torch.zeros(planes(zeros), width, dtype=torch.uint8, device=self.inside.wire(device))
        if own:
            self._run(own, present[:, numbers], zeros, step)
        everyone = self.inside.gather(self._bits, Message.NODE_VERDICTS).to(device)
        kernel = kernels.for_device(device)
        for shard, length, bits in zip(parts, lengths, everyone, strict=True):
            for block in self._blocks(length):
                kernel.apply(shard, block.lo, block.hi, bits[:, block.lo // 8 :])

    def _own(self, segment: Segment, part: Segment, mean: Tensor, present: bool) -> Segment:
        """Return the part with the node's momentum and the mean gradient."""
        own = Segment(part.parameter, part.group, {part.parameter: {}}, present, sent=mean)
        momentum = segment.state.get(segment.parameter, {}).get("momentum")
        if momentum is not None:
            own.state[own.parameter]["momentum"] = momentum.view(-1)
        if own.kept_momentum is not None:
            segment.state[segment.parameter]["momentum"] = own.kept_momentum
        return own

    def _apply(self, segments: list[Segment], block: _Block, bits: Tensor) -> None:
        """Keep a block's verdict until those of the other shards are gathered."""
        self._bits[:, block.lo // 8 : block.lo // 8 + bits.shape[-1]] = bits[:, : self._bits.shape[-1] - block.lo // 8]

    def _average(self, parts: list[list[Segment]], longest: int) -> Tensor:
        """Return the mean of the node's gradients for this rank's shard, float32 of shape (longest,).

        A block travels while the next is gathered from the gradients.

        Args:
            parts: laid out, of every rank's shard.
            longest: the length of the longest shard.
        """
        device = parts[0][0].parameter.device
        mean = torch.empty(longest, device=device)
        size = -(-self.block_size // len(parts))
        blocks = [(lo, min(lo + size, longest)) for lo in range(0, longest, size)]
        ahead = self._send(parts, *blocks[0])
        for k, (lo, hi) in enumerate(blocks):
            wait, received = ahead
            if k + 1 < len(blocks):
                ahead = self._send(parts, *blocks[k + 1])
            wait()
            mean[lo:hi] = received.sum(0) / len(parts)
        return mean

    def _send(self, parts: list[list[Segment]], lo: int, hi: int) -> tuple[Callable[[], None], Tensor]:
        """Start to swap gradients in [lo, hi) of the shards; return what waits for them, and where they will be."""
        rows = torch.zeros(len(parts), hi - lo, device=parts[0][0].parameter.device)
        for row, shard in zip(rows, parts, strict=True):
            for part, a, b in cover(shard, lo, hi):
                if part.present:
                    gradient = part.gradient(a, b)
                    if self.statistics is not None:
                        self.statistics.count_gradient(gradient)
                    place = row[part.start + a - lo : part.start + b - lo]
                    torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0, out=place)
        rows = rows.to(self.inside.wire(rows.device))
        received = torch.empty_like(rows)
        return self.inside.swap(rows, received, Message.MEAN), received
