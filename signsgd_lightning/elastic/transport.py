"""How bytes travel between workers that come and go: ballots over torchft's Gloo, a newcomer's state over HTTP."""

import urllib.request
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torchft import ProcessGroupGloo
from torchft.checkpointing import HTTPTransport

from .. import _compat
from ..vote.failures import PeerLostError
from ..vote.transport import Message, PointToPoint


class Members(PointToPoint):
    """Swaps bytes with every other worker of the quorum.

    Args:
        timeout: how long one that does not answer is waited for.

    Attributes:
        rank: this worker's number in the quorum.
        world_size: how many workers it has.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.gloo = ProcessGroupGloo(timeout)
        self.rank, self.world_size = 0, 1
        self.sent_bytes, self.waited_seconds = 0, 0.0

    def wire(self, device: torch.device) -> torch.device:
        """Return the CPU: Gloo sends from the host's memory alone."""
        return torch.device("cpu")

    def collect(self, row: Tensor, message: Message) -> Tensor | None:
        """Refuse: a worker that comes and goes has no place in a checkpoint of all.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "workers that come and go have no checkpoint of all their momenta: let one save model.state_dict() and "
            "optimizer.state_dict(), which is all there is with betas=(0, 0)"
        )

    def _start(self, outgoing: Tensor, incoming: Tensor, others: list[int], message: Message) -> list[dist.Work]:
        works = [self.gloo.recv([incoming[j]], j, message.tag) for j in others]
        return works + [self.gloo.send([outgoing[j]], j, message.tag) for j in others]

    def _lost(self, suspect: int | None, message: Message, error: Exception) -> PeerLostError:
        who = "a worker" if suspect is None else f"worker {suspect} of {self.world_size}"
        return PeerLostError(f"{who} stopped answering while the workers {message.value} ({error})", suspect)


class SafeHTTP(HTTPTransport[Any]):  # type: ignore[misc]
    """Sends a newcomer the state over HTTP; what arrives is loaded as tensors and plain values, never as code.

    Args:
        timeout: of a copy.
        hostname: by which others reach this machine.
    """

    def __init__(self, timeout: timedelta, hostname: str) -> None:
        super().__init__(timeout, num_chunks=0)
        self._hostname = hostname

    def metadata(self) -> str:
        """Return where others get the state, but for the step."""
        return f"http://{self._hostname}:{urlsplit(self.address()).port}/checkpoint/"

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Return the state that a worker sends.

        Raises:
            pickle.UnpicklingError: if it holds anything else than tensors and plain values.
        """
        with urllib.request.urlopen(f"{metadata}{step}/full", timeout=timeout.total_seconds()) as stream:
            return _compat.streaming_load(stream)
