import os
import socket
import sys
from collections.abc import Callable, Iterator
from threading import Thread

import pytest

from signsgd_core.network.traffic import (
    local_steps,
    majority_vote,
    power_sgd,
    ring_all_reduce,
    sent_since,
    sign_all_gather,
    socket_bytes,
)
from signsgd_core.wire import HEADER_BYTES

MILLION = 1_000_000


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8, 100])
def test_majority_vote(workers: int) -> None:
    """``2·(M−1)/M·d`` bits where 64·M divides d, and a header to each peer."""
    d, peers = 640 * workers, workers - 1
    ballots = 2 * peers * d // workers // 8
    assert majority_vote(d, workers) == peers * HEADER_BYTES + ballots
    assert majority_vote(d, workers, "positive") == majority_vote(d, workers, "alternate")
    assert majority_vote(d, workers, "abstain") == peers * HEADER_BYTES + 2 * ballots


def test_header_is_as_short_as_promised() -> None:
    assert 0 < HEADER_BYTES <= 64


@pytest.mark.parametrize(("parameters", "words"), [(0, 0), (1, 1), (128, 1), (129, 2), (256, 2), (257, 3)])
def test_shards_are_whole_words(parameters: int, words: int) -> None:
    """Two workers: each sends the other the ballot on one shard and the verdict on its own, 8 bytes a word."""
    assert majority_vote(parameters, 2) == HEADER_BYTES + 2 * 8 * words


def test_sign_all_gather() -> None:
    assert sign_all_gather(MILLION, 4) == 375_000
    assert sign_all_gather(9, 3) == 4
    assert sign_all_gather(MILLION, 1) == 0


def test_ring_all_reduce() -> None:
    assert ring_all_reduce(MILLION, 4, bits=32) == 6_000_000
    assert ring_all_reduce(MILLION, 4, bits=16) == 3_000_000
    assert ring_all_reduce(10, 3, bits=32) == 54  # 2·2/3·10·4 = 53⅓
    assert ring_all_reduce(MILLION, 1, bits=32) == 0


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (lambda: majority_vote(10, 0), "workers must be a whole number of 1 or more, got 0"),
        (lambda: majority_vote(-1, 2), "parameters must be a whole number of 0 or more, got -1"),
        (lambda: local_steps(10, 2, 0), "sync_every must be a whole number of 1 or more, got 0"),
        (lambda: sign_all_gather(10, 0), "workers must be a whole number of 1 or more, got 0"),
        (lambda: ring_all_reduce(10, 0, 32), "workers must be a whole number of 1 or more, got 0"),
        (lambda: ring_all_reduce(10, 2, 0), "bits must be a whole number of 1 or more, got 0"),
        (lambda: power_sgd(10, 2, 0), "rank must be a whole number of 1 or more, got 0"),
        (lambda: power_sgd(10, 2, 1, -1), "width must be a whole number of 1 or more, got -1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(sent: Callable[[], float], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        sent()


@pytest.mark.parametrize("workers", [2, 3, 4, 8, 64])
def test_vote_sends_32_times_less_than_the_ring(workers: int) -> None:
    """Headers and whole words cost less and less as the model grows."""
    ratios = [ring_all_reduce(10**n, workers, 32) / majority_vote(10**n, workers) for n in range(3, 11)]
    assert ratios == sorted(ratios)
    assert ratios[0] < 31
    assert 31.999 < ratios[-1] < 32


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    if sys.platform != "linux":
        pytest.skip("only Linux tells what a TCP socket has sent")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        receiver = listener.accept()[0]
        with sender, receiver:
            yield sender, receiver


@pytest.mark.parametrize("size", [1, 1000, 3_000_001])
def test_sent_bytes(connection: tuple[socket.socket, socket.socket], size: int) -> None:
    """Payload is counted once, at its sender, and nothing else is; both ends are open in this process."""
    sender, receiver = connection
    before = socket_bytes()
    assert sent_since(before) == 0
    _carry(sender, receiver, size)
    assert sent_since(before) == size
    _carry(receiver, sender, 5)
    assert sent_since(before) == size + 5
    after = socket_bytes()
    assert sorted(after[inode] - before[inode] for inode in map(_inode, connection)) == sorted([size, 5])
    assert sent_since(after) == 0


def test_a_socket_of_two_descriptors_counts_once(connection: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = connection
    before = socket_bytes()
    with sender.dup():
        _carry(sender, receiver, 1000)
        assert sent_since(before) == 1000


def test_sockets_opened_later_count(connection: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = connection
    _carry(sender, receiver, 1000)
    before = {inode: sent for inode, sent in socket_bytes().items() if inode not in map(_inode, connection)}
    assert sent_since(before) == 1000


def test_only_tcp_counts(connection: tuple[socket.socket, socket.socket]) -> None:
    before = socket_bytes()
    ours, other = socket.socketpair()
    with ours, other:
        _carry(ours, other, 1000)
        assert sent_since(before) == 0
        assert _inode(ours) not in socket_bytes()


def _inode(connection: socket.socket) -> int:
    return os.fstat(connection.fileno()).st_ino


def _carry(sender: socket.socket, receiver: socket.socket, size: int) -> None:
    thread = Thread(target=sender.sendall, args=(bytes(size),))
    thread.start()
    while size:
        size -= len(receiver.recv(min(size, 65_536)))
    thread.join()
