"""Are the ranks still the same, bit for bit? A few bytes each way, and a name for the one that is not."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .peers import Peers

_DIGEST_BYTES = 16


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
    whole = hashlib.blake2b(b"".join(digests), digest_size=_DIGEST_BYTES).digest()
    if _equal(peers.gather(_row(whole, device), "compared their parameters")):
        return
    rows = peers.gather(_row(b"".join(digests), device), "looked for the first difference")
    rows = rows.view(peers.world_size, len(tensors), _DIGEST_BYTES).cpu()
    k = next(k for k in range(len(tensors)) if not _equal(rows[:, k]))
    votes = (rows[:, None, k] == rows[None, :, k]).all(-1).sum(1)  # how many ranks each agrees with, itself included
    ranks = [rank for rank in range(len(votes)) if votes[rank] < votes.max()]
    raise RanksDifferError(ranks or list(range(len(votes))), step, tensors[k][0])


def _digest(values: Sequence[Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for value in values:
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _row(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _equal(rows: Tensor) -> bool:
    return bool((rows == rows[0]).all())
