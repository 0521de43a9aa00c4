"""`verify_every_n_steps`: a flipped bit on one rank is found at the next check and named; and adversaries."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from signsgd_core import Reference
from signsgd_core.adversaries import ADVERSARIES
from signsgd_lightning import MajorityVoteStrategy, RanksDifferError
from tests.lightning.models import Given, Net, trainer
from tests.workers import Workers

from .conftest import Fault

RANKS, STEPS = 3, 6


class FlipBit(Callback):
    """Flip one bit of a tensor on one rank, after one step."""

    def __init__(self, rank: int, step: int, momentum: bool = False) -> None:
        self.rank, self.step, self.momentum = rank, step, momentum

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if dist.get_rank() == self.rank and trainer.global_step == self.step + 1:
            p = pl_module.net[2].weight
            tensor = trainer.optimizers[0].state[p]["verdict_momentum"] if self.momentum else p.detach()
            tensor.view(torch.int32).view(-1)[3] ^= 1 << 20  # high enough to outlive a step's rounding


def _train(every: int, flips: list[Callback]) -> tuple[str, Any]:
    strategy = MajorityVoteStrategy(verify_every_n_steps=every)
    run = trainer(max_epochs=2, strategy=strategy, callbacks=flips)
    try:
        run.fit(Net(samples=36, verdict_momentum=0.5))
    except RanksDifferError as error:
        return str(error), (error.ranks, error.step, error.parameter)
    return "", run.global_step


def test_nothing_is_found_where_all_is_well(workers: Workers) -> None:
    assert workers.run(RANKS, _train, 1, []) == [("", STEPS)] * RANKS


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_flipped_bit_is_found_at_the_next_check(rank: int, momentum: bool, workers: Workers, fault: Fault) -> None:
    with fault("a bit flips in a parameter or a verdict momentum of a rank, and is found"):
        for message, found in workers.run(RANKS, _train, 2, [FlipBit(rank, 1, momentum)]):
            assert found == ([rank], 3, "net.2.weight")
            assert f"after step 3 rank {rank} differs from the other ranks in net.2.weight" in message


def test_two_ranks_cannot_tell_which_of_them_is_wrong(workers: Workers) -> None:
    for _, found in workers.run(2, _train, 1, [FlipBit(1, 0)]):
        assert found == ([0, 1], 1, "net.2.weight")


def test_nothing_is_compared_unless_asked_for(workers: Workers) -> None:
    assert workers.run(RANKS, _train, 0, [FlipBit(1, 0)]) == [("", STEPS)] * RANKS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verify_every_n_steps": -1}, "verify_every_n_steps must be a whole number of 0 or more, got -1"),
        ({"adversaries": {3: ADVERSARIES["invert"](0)}}, r"adversaries must be ranks 0 to 1, got \[3\]"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str, workers: Workers) -> None:
    for error in workers.run(2, _refused, arguments):
        assert re.search(message, error)


def _refused(arguments: dict[str, Any]) -> str:
    try:
        trainer(strategy=MajorityVoteStrategy(**arguments)).fit(Net())
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _lie(given: Any, names: dict[int, str]) -> list[Any]:
    adversaries = {rank: ADVERSARIES[name](rank) for rank, name in names.items()}
    model = Given(given, betas=(0.5, 0.5))
    trainer(strategy=MajorityVoteStrategy(adversaries=adversaries)).fit(model)
    return [p.detach().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize(
    "names", [{1: "invert"}, {0: "random", 3: "constant"}, {2: "silent"}, {1: "nan"}, {0: "collude", 1: "collude"}]
)
def test_adversaries_vote_as_the_reference_has_it(names: dict[int, str], workers: Workers, fault: Fault) -> None:
    random = np.random.default_rng(0)
    given = [[[(random.integers(-3, 4, 37) / 8).astype(np.float32)] for _ in range(4)] for _ in range(STEPS)]
    adversaries = {rank: ADVERSARIES[name](rank) for rank, name in names.items()}
    reference = Reference([np.ones(37, np.float32)], 4, 0.25, (0.5, 0.5), adversaries=adversaries)
    for gradients in given:
        reference.step(gradients)
    with fault("ranks that lie: they cost their votes and nothing else", len(names)):
        for (x,) in workers.run(4, _lie, given, names):
            np.testing.assert_array_equal(x, reference.parameters[0])
