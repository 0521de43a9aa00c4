"""Ranks that do different things at once are told so, and what an exception sets off waits for nobody."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import (
    GeometryMonitor,
    MajorityVoteStrategy,
    PeerLostError,
    Signum,
    enable_majority_vote,
    gather_state,
)
from signsgd_lightning.checkpoint.sharded import load_shards, save_shards
from signsgd_lightning.vote.verification import Verification
from tests.lightning.models import Net, trainer
from tests.workers import Workers, fresh_workers

from .conftest import Fault

pytestmark = pytest.mark.multiprocess

GROUP_TIMEOUT = 4.0


def _voter() -> tuple[DistributedDataParallel, Signum]:
    model = DistributedDataParallel(nn.Linear(3000, 1, bias=False))
    optimizer = Signum(model.parameters(), lr=0.1)
    enable_majority_vote(model, optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


def _moments(optimizer: Signum) -> None:
    monitor = GeometryMonitor(directory=None)
    monitor._everyone, monitor._rows = optimizer.vote.topology.everyone, []  # type: ignore[union-attr]
    monitor._parameters = optimizer.param_groups[0]["params"]
    monitor.report = type("Report", (), {"coordinates": 5})()
    monitor._moments()


THINGS: dict[str, Callable[[Any, Any], object]] = {
    "votes": lambda model, optimizer: optimizer.step(),
    "enables a vote, or starts a fit": enable_majority_vote,
    "gathers the momenta of all ranks, for a checkpoint": lambda model, optimizer: gather_state(optimizer),
    "verifies its parameters": lambda model, o: Verification(1).end(o.vote, o.views(), 0),
    "gathers figures for VoteMonitor": lambda model, o: o.vote.gather_counts(torch.zeros(9, dtype=torch.float64)),
    "gathers moments for GeometryMonitor": lambda model, optimizer: _moments(optimizer),
    "saves a sharded checkpoint": lambda model, optimizer: save_shards({"optimizer_states": []}, "never written"),
    "loads a sharded checkpoint": lambda model, optimizer: load_shards("never read", torch.load, 0, 2, momenta=True),
}


def _differ(pairs: list[tuple[str, str]]) -> list[str]:
    """Do one thing on rank 0 and another on rank 1, pair by pair; return what this rank was told."""
    (model, optimizer), told = _voter(), []
    for pair in pairs:
        try:
            THINGS[pair[dist.get_rank()]](model, optimizer)
        except RuntimeError as error:
            told.append(str(error))
        else:
            told.append("nothing")
    optimizer.step()  # as if nothing had happened
    return told


def test_every_two_things(workers: Workers, fault: Fault) -> None:
    pairs = [pair for first, second in combinations(THINGS, 2) for pair in ((first, second), (second, first))]
    with fault("two ranks do different things at once, and both are told", len(pairs)):
        for told in workers.run(2, _differ, pairs, group_timeout=10):
            for (first, second), sentence in zip(pairs, told, strict=True):
                assert sentence == (
                    f"the ranks do different things: rank 0 {first} where rank 1 {second}. Let every rank save, log "
                    "and step at the same points, never some ranks alone"
                )


def _in_the_midst() -> tuple[str, float]:
    """Rank 0 wants to save in the midst of a vote, as a signal's handler may; rank 1 goes on with the vote."""
    _, optimizer = _voter()
    assert optimizer.vote is not None
    peers: Any = optimizer.vote.topology.workers
    count = 0
    swap = peers.swap

    def interrupted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:  # the ballots
            peers.swap = swap
            gather_state(optimizer)
        return swap(*args)

    if peers.rank == 0:
        peers.swap = interrupted
    begin = time.monotonic()
    try:
        optimizer.step()
    except PeerLostError as error:
        return str(error), time.monotonic() - begin
    return "no error", 0.0


def test_in_the_midst_of_a_vote(fault: Fault) -> None:
    with fault("a rank saves in the midst of a vote, and all end with a sentence"), fresh_workers(2) as workers:
        for sentence, seconds in workers.run(2, _in_the_midst, group_timeout=GROUP_TIMEOUT):
            assert (
                "all ranks are alive (rank 0 waited while it compared notes; rank 1 waited while it sent ballots): "
                "they do different things, or the network between them is cut."
            ) in sentence
            assert seconds < GROUP_TIMEOUT + 4


def _raise() -> None:
    raise ValueError("the data are spoilt")


class _Spoilt(Net):
    """Raises, or does something else, at step 3 on the ranks that are told to."""

    def __init__(self, ranks: tuple[int, ...], do: Callable[[], None] = _raise) -> None:
        super().__init__()
        self.ranks, self.do = ranks, do

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 3 and self.global_rank in self.ranks:
            self.do()


def _spoilt(ranks: tuple[int, ...], kind: Any, folder: str) -> tuple[str, float]:
    """Train with both of Lightning's callbacks that save on exceptions."""
    savers = [
        OnExceptionCheckpoint(folder, "on_exception"),
        ModelCheckpoint(dirpath=folder, filename="saved", save_on_exception=True, save_last=True),
    ]
    strategy = MajorityVoteStrategy(state_dict_type=kind, timeout=timedelta(seconds=GROUP_TIMEOUT))
    begin = time.monotonic()
    try:
        trainer(strategy=strategy, callbacks=savers, enable_checkpointing=True).fit(_Spoilt(ranks))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "no error", time.monotonic() - begin


def _resume(path: str) -> tuple[int, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(max_epochs=2)
        run.fit(Net(), ckpt_path=path)
    return run.global_step, [str(w.message) for w in caught if "goes on with the momentum" in str(w.message)]


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        ((0, 1), "full"),
        pytest.param((0, 1), "sharded", marks=pytest.mark.nightly),
        pytest.param((0,), "full", marks=pytest.mark.nightly),
        ((0,), "sharded"),
        ((1,), "full"),
    ],
)
def test_an_exceptions_checkpoint(ranks: tuple[int, ...], kind: str, tmp_path: Path, fault: Fault) -> None:
    """The user's exception comes out at once where it was raised; one rank alone saves what it has."""
    with (
        fault("ranks raise, alike or one alone, with a checkpoint to be saved: the exception comes out"),
        fresh_workers(2) as workers,
    ):
        results = workers.run(2, _spoilt, ranks, kind, str(tmp_path), group_timeout=GROUP_TIMEOUT)
        for rank, (message, seconds) in enumerate(results):
            if rank in ranks:
                assert message == "ValueError: the data are spoilt"
            else:
                assert message.startswith(f"PeerLostError: rank {ranks[0]} stopped answering")
            assert seconds < GROUP_TIMEOUT + 6
        for name in ("on_exception", "saved"):
            assert (tmp_path / f"{name}.ckpt").is_file()
            for rank, (steps, said) in enumerate(workers.run(2, _resume, str(tmp_path / f"{name}.ckpt"))):
                assert steps == 8
                assert len(said) == rank  # rank 1's momentum was not saved
                assert rank == 0 or said[0].startswith("worker 1 of 2 goes on with the momentum of worker 0 of 2")


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _terminated(ranks: tuple[int, ...]) -> tuple[str, float]:
    begin = time.monotonic()
    try:
        trainer(strategy=MajorityVoteStrategy(timeout=timedelta(seconds=GROUP_TIMEOUT))).fit(_Spoilt(ranks, _terminate))
    except BaseException as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "no error", time.monotonic() - begin


@pytest.mark.parametrize(
    "ranks", [(0, 1), pytest.param((0,), marks=pytest.mark.nightly), (1,)], ids=["all", "rank 0", "rank 1"]
)
def test_a_signal_to_end(ranks: tuple[int, ...], fault: Fault) -> None:
    with fault("ranks get SIGTERM, all or one alone: all end with an exception"), fresh_workers(2) as workers:
        results = workers.run(2, _terminated, ranks, group_timeout=GROUP_TIMEOUT)
        for message, seconds in results:
            assert message.startswith(("SIGTERMException", "PeerLostError", "RuntimeError")), results
            assert seconds < 2 * GROUP_TIMEOUT + 6
