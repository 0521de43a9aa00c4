"""Do all ranks speak of the same model, settings and step? 32 bytes each way, before any ballot is cast."""

import hashlib

import torch
from torch import Tensor

from signsgd_core import disagreement
from signsgd_core.traffic import HEADER_BYTES

from .kernels.cpu import packbits, unpackbits
from .peers import Peers

_DIGEST_BYTES = 16
_TIMES_LONGER, _SPARE_BYTES = 4, 1 << 16


def agree(peers: Peers, lines: list[str], present: Tensor, device: torch.device) -> Tensor:
    """Compare what each rank is about to vote on, and learn who has a gradient for what.

    A header is a 16-byte digest of the lines, one byte that says whether every gradient is there, and zeros. Only
    where somebody lacks one does each rank send one bit a parameter, too.

    Args:
        peers: the other ranks.
        lines: what must be the same on all ranks, in words.
        present: which parameters have a gradient on this rank, bool of shape (parameters,).
        device: where the backend wants its bytes.

    Returns:
        bool of shape (ranks, parameters).

    Raises:
        PeerLostError: if a rank does not answer.
        RuntimeError: if the lines differ, on all ranks, naming the first difference.
    """
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=_DIGEST_BYTES).digest()
    header = (digest + bytes([bool(present.all())])).ljust(HEADER_BYTES, b"\0")
    row = torch.tensor(list(header), dtype=torch.uint8).to(device)
    headers = peers.gather(row, "compared notes").cpu()
    if (headers[:, :_DIGEST_BYTES] != headers[0, :_DIGEST_BYTES]).any():
        raise RuntimeError(_difference(peers, lines, device))
    if headers[:, _DIGEST_BYTES].all():
        return torch.ones(peers.world_size, len(present), dtype=torch.bool)
    bits = peers.gather(packbits(present).to(device), "said which gradients they have")
    return unpackbits(bits.cpu(), len(present))


def describe(name: str, parameter: Tensor) -> str:
    """Return a parameter in words, as `agree` compares it."""
    return f"{name}: shape {tuple(parameter.shape)}, {parameter.dtype}"


def _difference(peers: Peers, lines: list[str], device: torch.device) -> str:
    text = "\n".join(lines).encode()
    doing = "looked for what they disagree about"
    sizes = peers.gather(torch.tensor([len(text)]).to(device), doing).flatten().tolist()
    # Bytes, never pickles, and no more of them than a multiple of the shortest: a rank may have gone mad, or worse.
    longest = min(max(sizes), _TIMES_LONGER * max(min(sizes), 1) + _SPARE_BYTES)
    row = torch.frombuffer(bytearray(text[:longest].ljust(longest, b"\n")), dtype=torch.uint8)
    rows = peers.gather(row.to(device), doing).cpu().numpy()
    everyone = [row.tobytes().decode(errors="replace").rstrip("\n").split("\n") for row in rows]
    if all(theirs == everyone[0] for theirs in everyone):
        return "the ranks cannot vote: a header does not fit the words it stands for; memory or the network failed"
    return (
        f"the ranks disagree and cannot vote: {disagreement(everyone, 'rank')}. Build the same model and the same "
        "optimizer, with the same settings, on every rank."
    )
