"""Are all ranks about to do the same, with the same model, settings and step? 32 bytes each way, ahead of all else."""

from enum import Enum

import numpy as np
import torch
from torch import Tensor

from signsgd_core.wire import DIGEST_BYTES, HEADER_BYTES, digest, disagreement

from ..kernels.cpu import packbits, unpackbits
from ..sharding import placement
from .transport import Message, PointToPoint

_FLAG, _PURPOSE = DIGEST_BYTES, DIGEST_BYTES + 1  # their places in a header
_TIMES_LONGER, _SPARE_BYTES = 4, 1 << 16


class Purpose(Enum):
    """What a rank is about to do together with the others, in words for errors; a new one goes to the end."""

    VOTE = "votes"
    ENABLE = "enables a vote, or starts a fit"
    STATE = "gathers the momenta of all ranks, for a checkpoint"
    VERIFY = "verifies its parameters"
    FIGURES = "gathers figures for VoteMonitor"
    MOMENTS = "gathers moments for GeometryMonitor"
    SAVE = "saves a sharded checkpoint"
    LOAD = "loads a sharded checkpoint"

    @property
    def code(self) -> int:
        """The byte of a header that says it."""
        return list(Purpose).index(self)


def meet(
    ranks: PointToPoint, purpose: Purpose, device: torch.device, summary: bytes = b"", flag: bool = False
) -> Tensor:
    """Make sure that all ranks are about to do the same; whatever ranks do together begins with it.

    A header is a 16-byte summary, a byte for the flag, a byte for the purpose, and zeros.

    Args:
        ranks: the other ones.
        purpose: what this rank is about to do.
        device: where the backend wants its bytes.
        summary: 16 bytes for the others to compare, or none.
        flag: for the others to know.

    Returns:
        The summaries and flags of all ranks, uint8 of shape (ranks, 17), on the CPU.

    Raises:
        PeerLostError: if a rank does not answer.
        RuntimeError: on all ranks, if they are about to do different things.
    """
    header = (summary.ljust(DIGEST_BYTES, b"\0") + bytes([flag, purpose.code])).ljust(HEADER_BYTES, b"\0")
    row = torch.tensor(list(header), dtype=torch.uint8, device=device)
    headers = ranks.gather(row, Message.HEADER).cpu()
    purposes = dict(enumerate(Purpose))
    codes: list[int] = headers[:, _PURPOSE].tolist()
    other = next((rank for rank, code in enumerate(codes) if code != codes[0] and code in purposes), None)
    if other is not None and codes[0] in purposes:
        raise RuntimeError(
            f"the ranks do different things: rank 0 {purposes[codes[0]].value} where rank {other} "
            f"{purposes[codes[other]].value}. Let every rank save, log and step at the same points, never some ranks "
            "alone"
        )
    return headers[:, :_PURPOSE]


def agree(
    ranks: PointToPoint, lines: list[str], present: Tensor, device: torch.device, purpose: Purpose = Purpose.VOTE
) -> Tensor:
    """Compare what each rank is about to vote on, and learn who has a gradient for what.

    The header has a digest of the lines, and the flag says whether every gradient is there. Only where somebody lacks
    one does each rank send one bit a parameter, too.

    Args:
        ranks: the other ones.
        lines: what must be the same on all ranks, in words.
        present: which parameters have a gradient on this rank, bool of shape (parameters,).
        device: where the backend wants its bytes.
        purpose: what the ranks are about to do.

    Returns:
        bool of shape (ranks, parameters).

    Raises:
        PeerLostError: if a rank does not answer.
        RuntimeError: if the lines differ, on all ranks, naming the first difference.
    """
    text = "\n".join(lines).encode()
    headers = meet(ranks, purpose, device, digest([np.frombuffer(text, np.uint8)]), bool(present.all()))
    if (headers[:, :DIGEST_BYTES] != headers[0, :DIGEST_BYTES]).any():
        raise RuntimeError(_difference(ranks, text, device))
    if headers[:, _FLAG].all():
        return torch.ones(ranks.world_size, len(present), dtype=torch.bool, device="cpu")
    bits = ranks.gather(packbits(present).to(device), Message.PRESENT)
    return unpackbits(bits.cpu(), len(present))


def describe(name: str, parameter: Tensor) -> str:
    """Return a parameter in words, as `agree` compares it."""
    return f"{name}: shape {tuple(parameter.shape)}, {parameter.dtype}{placement(parameter)}"


def _difference(ranks: PointToPoint, text: bytes, device: torch.device) -> str:
    sizes = ranks.gather(torch.tensor([len(text)], device=device), Message.SIZE).flatten().tolist()
    # Bytes, never pickles, and no more of them than a multiple of the shortest: a rank may have gone mad, or worse.
    longest = min(max(sizes), _TIMES_LONGER * max(min(sizes), 1) + _SPARE_BYTES)
    row = torch.frombuffer(bytearray(text[:longest].ljust(longest, b"\n")), dtype=torch.uint8)
    rows = ranks.gather(row.to(device), Message.TEXT).cpu().numpy()
    everyone = [row.tobytes().decode(errors="replace").rstrip("\n").split("\n") for row in rows]
    if all(theirs == everyone[0] for theirs in everyone):
        return "the ranks cannot vote: a header does not fit the words it stands for; memory or the network failed"
    return (
        f"the ranks disagree and cannot vote: {disagreement(everyone, 'rank')}. Build the same model and the same "
        "optimizer, with the same settings, on every rank."
    )
