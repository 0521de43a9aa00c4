"""Are the ranks still the same, bit for bit? A few bytes each way, and a name for the one that is not."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from signsgd_core.digests import DIGEST_BYTES, digest, first_difference

from .agreement import Purpose, meet
from .memory import plain
from .peers import Message, Peers


class RanksDifferError(RuntimeError):
    """Parameters or verdict momenta are not the same on all ranks.

    Attributes:
        ranks: those that differ from the most others.
        step: after which it was found.
        parameter: the name of the first that differs.
    """

    def __init__(self, ranks: list[int], step: int, parameter: str) -> None:
        who = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
        super().__init__(
            f"after step {step} {who} differs from the other ranks in {parameter}, or in its verdict momentum: memory "
            "failed there, or code changed parameters on that rank alone. Restart all ranks from the last checkpoint."
        )
        self.ranks, self.step, self.parameter = ranks, step, parameter


def verify(peers: Peers, tensors: Sequence[tuple[str, Sequence[Tensor]]], step: int) -> None:
    """Make sure that all ranks hold the same bits.

    Args:
        peers: the other ranks.
        tensors: each parameter's name, and what must be the same: the parameter, its verdict momentum.
        step: `t`, the number of the step just taken.

    Raises:
        RanksDifferError: if not, on all ranks.
        PeerLostError: if a rank does not answer.
    """
    digests = [_digest(values) for _, values in tensors]
    device = peers.wire(tensors[0][1][0].device)
    whole = digest([np.frombuffer(b"".join(digests), np.uint8)])
    headers = meet(peers, Purpose.VERIFY, device, whole)
    if (headers == headers[0]).all():
        return
    row = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8)
    rows = peers.gather(row.to(device), Message.DIGESTS)
    found = first_difference(rows.view(peers.world_size, len(tensors), DIGEST_BYTES).cpu().numpy())
    assert found is not None
    k, ranks = found
    raise RanksDifferError(ranks, step, tensors[k][0])


def _digest(values: Sequence[Tensor]) -> bytes:
    memory = (plain(v.detach()).cpu().contiguous() for v in values)
    return digest(v.reshape(-1).view(torch.uint8).numpy() for v in memory)
