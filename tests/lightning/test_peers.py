"""A rank that dies, hangs or leaves ends every other rank with an error that names it, within the timeout."""

import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core import Zeros, planes
from signsgd_core.network import traffic
from signsgd_lightning import PeerLostError, Signum, enable_majority_vote
from signsgd_lightning.vote.failures import first_lost
from tests.votes import set_bucket_size
from tests.workers import Workers, fresh_workers

pytestmark = pytest.mark.multiprocess

GROUP_TIMEOUT = 4.0


def _trainer(length: int = 3000, bucket_size: int = 1 << 22) -> tuple[DistributedDataParallel, Signum]:
    model = DistributedDataParallel(nn.Linear(length, 1, bias=False))
    optimizer = Signum(model.parameters(), lr=0.1)
    enable_majority_vote(model, optimizer)
    set_bucket_size(optimizer, bucket_size)
    return model, optimizer


def _step(model: DistributedDataParallel, optimizer: Signum) -> None:
    model(torch.ones(1, model.module.in_features)).sum().backward()
    optimizer.step()


def _fail_at(moment: int, victim: int, signal_number: int) -> tuple[int | None, str, float]:
    """Take two good steps, then lose the victim at its `moment`-th swap of the third; return what the others saw."""
    model, optimizer = _trainer(bucket_size=1024)
    for _ in range(2):
        _step(model, optimizer)
    assert optimizer.vote is not None
    peers, swap, swaps = optimizer.vote.topology.workers, optimizer.vote.topology.workers.swap, 0

    def swap_or_die(*args):  # type: ignore[no-untyped-def]
        nonlocal swaps
        if peers.rank == victim and swaps == moment:
            os.kill(os.getpid(), signal_number)
        swaps += 1
        return swap(*args)

    peers.swap = swap_or_die  # type: ignore[method-assign]
    begin = time.monotonic()
    try:
        _step(model, optimizer)
    except PeerLostError as error:
        return error.rank, str(error), time.monotonic() - begin
    return None, "the step went through", time.monotonic() - begin


@pytest.mark.parametrize(
    "victim", [pytest.param(0, marks=pytest.mark.nightly), 1, pytest.param(2, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(("name", "signal_number"), [("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)])
def test_lost_rank_is_named(name: str, signal_number: int, victim: int) -> None:
    moment = victim * 2  # the header, a block's ballots, a block's verdict
    with fresh_workers(3) as workers:
        results = workers.run(
            3, _fail_at, moment, victim, signal_number, lost=(victim,), group_timeout=GROUP_TIMEOUT, timeout=40
        )
        for rank, result in enumerate(results):
            if rank != victim:
                lost, message, seconds = result
                assert lost == victim, message
                assert message.startswith(f"rank {victim} stopped answering while the ranks ")
                assert seconds < GROUP_TIMEOUT + 4
    assert not any(process.is_alive() for process in workers.processes)


def _blame(suspects: tuple[int | None, ...], victim: int, signal_number: int) -> int | None:
    """Lose the victim, and return who the others take for the first one lost, whomever they suspected at first."""
    rank = torch.distributed.get_rank()
    torch.distributed.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal_number)
    time.sleep(0.2)
    return first_lost(torch.distributed.distributed_c10d._get_default_group(), suspects[rank])[0]


@pytest.mark.parametrize(
    ("victim", "signal_number", "suspects"),
    [
        (0, signal.SIGSTOP, (None, 2, 3, 0)),  # the store is lost with it
        pytest.param(0, signal.SIGKILL, (None, None, 1, 1), marks=pytest.mark.nightly),
        (2, signal.SIGSTOP, (1, 3, None, 2)),  # the blame is followed
        (2, signal.SIGKILL, (1, 0, None, 0)),  # it leads in a circle
        pytest.param(2, signal.SIGSTOP, (None, None, None, 2), marks=pytest.mark.nightly),
        (2, signal.SIGKILL, (None, None, None, None)),
    ],
)
def test_survivors_blame_the_lost_one_in_the_end(
    victim: int, signal_number: int, suspects: tuple[int | None, ...]
) -> None:
    with fresh_workers(4) as workers:
        results = workers.run(4, _blame, suspects, victim, signal_number, lost=(victim,), timeout=40)
    assert [result for rank, result in enumerate(results) if rank != victim] == [victim] * 3


def _settle() -> None:
    """Wait until all that was handed to the sockets has left."""
    torch.distributed.barrier()
    time.sleep(0.2)


def _count(length: int, zeros: Zeros, unused: bool) -> tuple[int, int, int]:
    """Return the payload of a step, what the sockets sent meanwhile, and how many messages that were."""
    model = DistributedDataParallel(nn.ParameterList([torch.zeros(length), torch.zeros(9)]))
    optimizer = Signum(model.parameters(), lr=0.1, zeros=zeros)
    enable_majority_vote(model, optimizer)
    first, second = model.parameters()
    first.grad, second.grad = torch.ones(length), torch.ones(9)
    if unused and torch.distributed.get_rank() == 1:
        second.grad = None
    assert optimizer.vote is not None
    peers = optimizer.vote.topology.workers
    optimizer.step()  # connections are made
    _settle()
    payload, before = peers.sent_bytes, traffic.socket_bytes()
    optimizer.step()
    _settle()
    payload, sent = peers.sent_bytes - payload, traffic.sent_since(before)
    torch.distributed.barrier()  # nobody closes a connection before all have counted
    messages = (3 + unused) * (peers.world_size - 1) + 4  # the last ones are the barrier's
    return payload, sent, messages


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("zeros", ["alternate", "abstain"])
@pytest.mark.parametrize("unused", [False, True])
def test_bytes_on_the_wire(workers: Workers, world_size: int, zeros: Zeros, unused: bool) -> None:
    length = 1_000_003
    presence = (world_size - 1) * unused  # one bit a tensor and peer, here two bits in a byte
    expected = traffic.majority_vote(length + 9, world_size, zeros) + presence
    formula = 2 * (world_size - 1) / world_size * (length + 9) / 8 * planes(zeros)
    assert expected <= formula + (world_size - 1) * (64 + 16 * (planes(zeros) - 1)) + presence
    for payload, sent, messages in workers.run(world_size, _count, length, zeros, unused):
        assert payload == expected
        assert payload <= sent <= payload + 160 * messages  # and Gloo's frames
