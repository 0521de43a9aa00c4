"""Bytes that a worker sends per step in each way to exchange gradients, from sizes alone; and the bytes really sent.

`M` workers, `d` parameters. All figures are bytes of payload, without the headers of TCP and IP. Raises
ValueError for a size that is no whole number, or too small.
"""

import os
import socket
import stat
import struct

from ..ballots import Zeros, planes
from ..settings import check_count
from ..wire import HEADER_BYTES, shard_bytes


def _check_sizes(parameters: int, **others: int) -> None:
    check_count("parameters", parameters, 0)
    for name, value in others.items():
        check_count(name, value, 1)


def majority_vote(parameters: int, workers: int, zeros: Zeros = "alternate") -> int:
    """Our vote: all-to-all of ballots, all-gather of verdicts, ``2·(M−1)/M·d`` bits and a header a peer.

    Args:
        parameters: `d`.
        workers: `M`.
        zeros: the zero rule; "abstain" takes two bits per coordinate.

    Example:
        >>> majority_vote(1_000_000, workers=4)
        187632
    """
    _check_sizes(parameters, workers=workers)
    shard = shard_bytes(parameters, workers) * planes(zeros)
    return (workers - 1) * (HEADER_BYTES + 2 * shard)


def local_steps(parameters: int, workers: int, sync_every: int, tensors: int = 0) -> float:
    """Our vote on displacements: ``2·(M−1)/M·d/H`` bits a step, and ``4·(tensors + 1)`` bytes a peer and round.

    Args:
        parameters: `d`.
        workers: `M`.
        sync_every: `H`.
        tensors: how many have a magnitude of their own.

    Example:
        >>> local_steps(1_000_000, workers=4, sync_every=16)
        11727.75
    """
    check_count("sync_every", sync_every, 1)
    return (majority_vote(parameters, workers) + (workers - 1) * 4 * (tensors + 1)) / sync_every


def sign_all_gather(parameters: int, workers: int) -> int:
    """Unsharded 1-bit all-gather: every worker gets every other's ballot, ``(M−1)·d`` bits.

    Example:
        >>> sign_all_gather(1_000_000, workers=4)
        375000
    """
    _check_sizes(parameters, workers=workers)
    return (workers - 1) * -(-parameters // 8)


def ring_all_reduce(parameters: int, workers: int, bits: int) -> int:
    """Ring all-reduce of `bits`-bit numbers, ``2·(M−1)/M·d`` of them: what DDP does, 32 in fp32, 16 in bf16.

    Example:
        >>> ring_all_reduce(1_000_000, workers=4, bits=32)
        6000000
    """
    _check_sizes(parameters, workers=workers, bits=bits)
    return -(-2 * (workers - 1) * parameters * bits // (8 * workers))


def power_sgd(parameters: int, workers: int, rank: int, width: int = 1000) -> int:
    """PowerSGD of square layers: two factors of rank `r` for a matrix, vectors in full, by ring all-reduce in fp32.

    A layer of ``n² + n`` parameters sends ``2·r·n + n`` numbers (arXiv 1905.13727); the larger its layers, the less
    a model sends.

    Args:
        parameters: `d`, all in layers of a matrix and a bias.
        workers: `M`.
        rank: `r`.
        width: `n`.

    Example:
        >>> power_sgd(10_010_000, workers=4, rank=1)
        180000
    """
    _check_sizes(parameters, rank=rank, width=width)
    numbers = -(-parameters * (2 * rank + 1) // (width + 1))
    return ring_all_reduce(numbers, workers, 32)


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
