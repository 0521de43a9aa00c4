"""A rank that sends garbage: a sentence or an end on all the others, never a vote they did not agree to."""

import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote
from signsgd_lightning.vote.transport import Message
from tests.workers import Workers, fresh_workers

from .conftest import Fault

pytestmark = pytest.mark.multiprocess

RANKS, LENGTH, HOSTILE = 3, 3000, 1
TELLERS_BYTES = 128
"""Of a ballot of LENGTH bits, in each of RANKS shards."""


def _voter() -> tuple[DistributedDataParallel, Signum]:
    model = DistributedDataParallel(nn.Linear(LENGTH, 1, bias=False))
    nn.init.zeros_(model.module.weight)
    optimizer = Signum(model.parameters(), lr=1.0, betas=(0.0, 0.0))
    enable_majority_vote(model, optimizer)
    model.module.weight.grad = torch.ones(1, LENGTH)
    return model, optimizer


def _garbled(garble: Callable[[int, Tensor], Tensor]) -> tuple[str, list[float], int]:
    """Take a step, on the hostile rank with every row that it sends garbled; return what came of it.

    It counts what it sends: 1 the header, 2 that of the comparison before the first vote, or, where headers differ, the
    size of a description, 3 the ballots, or the description.
    """
    model, optimizer = _voter()
    assert optimizer.vote is not None
    peers, count = optimizer.vote.topology.workers, 0

    def garbled(outgoing: Tensor, incoming: Tensor, message: Message) -> Callable[[], None]:
        nonlocal count
        count += 1
        rows = garble(count, outgoing.contiguous())
        others = [rank for rank in range(RANKS) if rank != HOSTILE]
        works = [dist.isend(rows[rank].contiguous(), rank, tag=message.tag) for rank in others]
        works += [dist.irecv(incoming[rank], rank, tag=message.tag) for rank in others]
        if rows.shape == outgoing.shape:
            incoming[HOSTILE].copy_(rows[HOSTILE])  # so that it goes the way that the others go

        def wait() -> None:
            for work in works:
                assert work is not None
                work.wait()

        return wait

    if peers.rank == HOSTILE:
        peers.swap = garbled  # type: ignore[method-assign]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        optimizer.step()
        message = ""
    except (RuntimeError, ValueError) as error:
        message = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    dist.barrier()
    return message, model.module.weight.detach().flatten().tolist(), grown


def _garbage(rows: Tensor) -> Tensor:
    """Bytes that no purpose has; one that others take for another purpose ends the vote, too, but in other words."""
    return torch.randint(128, 256, rows.shape, dtype=torch.uint8)


def _header(count: int, rows: Tensor) -> Tensor:
    return _garbage(rows) if count == 1 else rows


def _header_and_text(count: int, rows: Tensor) -> Tensor:
    return _garbage(rows) if count in (1, 3) else rows


def _boasting(count: int, rows: Tensor) -> Tensor:
    """Of another model, whose description would fill the others' memory."""
    if count == 1:
        return torch.zeros_like(rows)
    return torch.full_like(rows, 1 << 50) if rows.dtype == torch.int64 else torch.zeros_like(rows)


@pytest.mark.parametrize(
    ("garble", "sentence"),
    [
        (_header, "a header does not fit the words it stands for"),
        (_header_and_text, "the ranks disagree and cannot vote: rank 0 has «"),
    ],
)
def test_garbage_for_a_header(garble: Any, sentence: str, workers: Workers, fault: Fault) -> None:
    with fault("a rank sends garbage for a header"):
        for message, weight, _ in workers.run(RANKS, _garbled, garble):
            assert sentence in message
            assert not any(weight), "they voted all the same"


def test_memory_is_bounded_by_what_the_others_need(fault: Fault) -> None:
    with fault("a rank announces a description of a petabyte"), fresh_workers(RANKS) as workers:
        ends = workers.run(RANKS, _garbled, _boasting, lost=(HOSTILE,), group_timeout=4)
        for rank in (0, 2):
            message, weight, kibibytes = ends[rank]
            assert message
            assert not any(weight)
            assert kibibytes < 50_000


def _short(count: int, rows: Tensor) -> Tensor:
    return rows[..., : TELLERS_BYTES // 2] if count == 3 else rows


def test_a_short_ballot_costs_its_sender_alone(workers: Workers, fault: Fault) -> None:
    """What it leaves out are its own zeros, here against two who all say the same."""
    with fault("a rank sends too short a ballot"):
        for message, weight, _ in workers.run(RANKS, _garbled, _short):
            assert message == ""
            assert weight == [-1.0] * LENGTH


def _long(count: int, rows: Tensor) -> Tensor:
    return torch.zeros(RANKS, 1 << 20, dtype=torch.uint8) if count == 3 else rows


def test_a_long_ballot_ends_who_gets_it(fault: Fault) -> None:
    """Gloo ends the process with a word about the sizes, before it takes a byte."""
    with fault("a rank sends too long a ballot"), fresh_workers(RANKS) as workers:
        with pytest.raises((EOFError, ConnectionResetError)):
            workers.run(RANKS, _garbled, _long, lost=(HOSTILE,), group_timeout=4)
        for rank in (0, 2):
            workers.processes[rank].join(20)
            assert workers.processes[rank].exitcode == -6


def test_the_sizes_are_those_of_the_wire(workers: Workers) -> None:
    unit = 64 * RANKS
    assert 8 * -(-LENGTH // unit) == TELLERS_BYTES
    weights = [weight for _, weight, _ in workers.run(RANKS, _garbled, _as_it_is)]
    np.testing.assert_array_equal(weights, -np.ones((RANKS, LENGTH)))


def _as_it_is(count: int, rows: Tensor) -> Tensor:
    return rows
