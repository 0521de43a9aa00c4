"""Bytes per step of each way to exchange a step's gradients, from sizes alone; and the bytes really sent.

`M` workers, `d` parameters. All figures are bytes of payload, without the headers of TCP and IP.
"""

import os
import socket
import stat
import struct
from collections.abc import Callable
from typing import NamedTuple

from .ballots import Zeros, planes

HEADER_BYTES = 32
"""What each worker sends each other worker before its ballots."""

WORD_BITS = 64
"""A shard of the vote is whole words of so many coordinates."""


class Traffic(NamedTuple):
    """Bytes of one step: `worker` is what a worker sends, `busiest` what the busiest machine sends."""

    worker: int
    busiest: int


def majority_vote(parameters: int, workers: int, zeros: Zeros = "alternate") -> Traffic:
    """Our vote: all-to-all of ballots, all-gather of verdicts, ``2·(M−1)/M·d`` bits and a header a peer.

    Args:
        parameters: `d`.
        workers: `M`.
        zeros: the zero rule; "abstain" takes two bits per coordinate.

    Example:
        >>> majority_vote(1_000_000, workers=4)
        Traffic(worker=187632, busiest=187632)
    """
    shard = WORD_BITS // 8 * -(-parameters // (WORD_BITS * workers)) * planes(zeros)
    return _everyone((workers - 1) * (HEADER_BYTES + 2 * shard))


def sign_all_gather(parameters: int, workers: int) -> Traffic:
    """Unsharded 1-bit all-gather: every worker gets every other's ballot, ``(M−1)·d`` bits.

    Example:
        >>> sign_all_gather(1_000_000, workers=4).worker
        375000
    """
    return _everyone((workers - 1) * -(-parameters // 8))


def parameter_server(parameters: int, workers: int, bits: int) -> Traffic:
    """One root takes ``d`` numbers of `bits` bits from each worker and sends each as many back.

    Example:
        >>> parameter_server(1_000_000, workers=4, bits=1)
        Traffic(worker=125000, busiest=500000)
    """
    message = -(-parameters * bits // 8)
    return Traffic(worker=message, busiest=workers * message)


def ring_all_reduce(parameters: int, workers: int, bits: int) -> Traffic:
    """Ring all-reduce of `bits`-bit numbers, ``2·(M−1)/M·d`` of them: what DDP does, 32 in fp32, 16 in bf16.

    Example:
        >>> ring_all_reduce(1_000_000, workers=4, bits=32).worker
        6000000
    """
    return _everyone(-(-2 * (workers - 1) * parameters * bits // (8 * workers)))


def power_sgd(parameters: int, workers: int, rank: int, width: int = 1000) -> Traffic:
    """PowerSGD of square layers: two factors of rank `r` for a matrix, vectors in full, by ring all-reduce in fp32.

    A layer of ``n² + n`` parameters sends ``2·r·n + n`` numbers (arXiv 1905.13727); the larger its layers, the less
    a model sends.

    Args:
        parameters: `d`, all in layers of a matrix and a bias.
        workers: `M`.
        rank: `r`.
        width: `n`.

    Example:
        >>> power_sgd(10_010_000, workers=4, rank=1).worker
        180000
    """
    numbers = -(-parameters * (2 * rank + 1) // (width + 1))
    return ring_all_reduce(numbers, workers, 32)


SCHEMES: dict[str, Callable[[int, int], Traffic]] = {
    "majority vote, 1 bit": majority_vote,
    "all-gather, 1 bit": sign_all_gather,
    "parameter server, 1 bit": lambda d, m: parameter_server(d, m, 1),
    "parameter server, fp32": lambda d, m: parameter_server(d, m, 32),
    "ring all-reduce, bf16": lambda d, m: ring_all_reduce(d, m, 16),
    "ring all-reduce, fp32": lambda d, m: ring_all_reduce(d, m, 32),
}
"""Every scheme by name, as a function of `(parameters, workers)`."""


def stops_paying(scheme: str, parameters: int, against: str = "ring all-reduce, fp32", most: int = 4096) -> int | None:
    """Return the smallest number of workers, 2 or more, at which a scheme sends no less than another.

    Compared by the busiest machine, since that is what a step waits for.

    Args:
        scheme: a name in `SCHEMES`.
        parameters: `d`.
        against: a name in `SCHEMES`.
        most: the largest number of workers to try.

    Returns:
        The number of workers, or `None` if the scheme pays up to `most`.

    Raises:
        ValueError: if either name is not in `SCHEMES`.

    Example:
        >>> stops_paying("all-gather, 1 bit", 1_000_000), stops_paying("majority vote, 1 bit", 1_000_000)
        (64, None)
    """
    for name in (scheme, against):
        if name not in SCHEMES:
            raise ValueError(f"unknown scheme {name!r}, take one of {', '.join(map(repr, SCHEMES))}")
    for workers in range(2, most + 1):
        if SCHEMES[scheme](parameters, workers).busiest >= SCHEMES[against](parameters, workers).busiest:
            return workers
    return None


def socket_bytes() -> dict[int, int]:
    """Return what each open TCP socket of this process has sent, in bytes of payload as the kernel counted them.

    What it had to send again is not counted twice.

    Returns:
        Socket (its inode) -> bytes; empty where the system has no such counter (it needs Linux 4.19).
    """
    if not hasattr(socket, "TCP_INFO") or not os.path.isdir("/proc/self/fd"):
        return {}
    sent = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.stat(int(name))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue  # closed meanwhile, or no TCP socket
        if len(info) >= 216:  # struct tcp_info: tcpi_bytes_sent, tcpi_bytes_retrans
            total, again = struct.unpack_from("QQ", info, 200)
            sent[status.st_ino] = total - again
    return sent


def sent_since(before: dict[int, int]) -> int:
    """Return how many bytes the sockets that are open now have sent since `before` was taken by `socket_bytes`.

    Example:
        >>> sent_since(socket_bytes())
        0
    """
    return sum(sent - before.get(inode, 0) for inode, sent in socket_bytes().items())


def _everyone(sent: int) -> Traffic:
    return Traffic(worker=sent, busiest=sent)
