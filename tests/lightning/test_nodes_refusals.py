"""What a vote between nodes refuses before the first step, on every rank, and what it says."""

import os
import re
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.adversaries import invert
from signsgd_lightning import MajorityVoteStrategy, Signum, enable_majority_vote
from tests.workers import Workers

UNNUMBERED = "needs ranks that are numbered node by node, 2 a node: of {} ranks, rank {} has the place {} in its node"


def _refused(places: list[tuple[Any, Any]], settings: list[dict[str, Any]], some: bool) -> str:
    """What was said, with LOCAL_WORLD_SIZE, LOCAL_RANK and arguments by rank."""
    rank = dist.get_rank()
    for name, value in zip(("LOCAL_WORLD_SIZE", "LOCAL_RANK"), places[rank], strict=True):
        os.environ.pop(name) if value is None else os.environ.update({name: str(value)})
    group = dist.new_group([0, 1]) if some else None
    if some and rank > 1:
        return "not asked"
    model = DistributedDataParallel(nn.Linear(3, 2), process_group=group)
    optimizer = Signum(model.parameters())
    try:
        enable_majority_vote(model, optimizer, **settings[rank])
    except (ValueError, RuntimeError) as error:
        assert optimizer.vote is None
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


NODES: dict[str, Any] = {"vote_between": "nodes"}
TWO_BY_TWO: list[tuple[Any, Any]] = [(2, 0), (2, 1), (2, 0), (2, 1)]

CASES: dict[str, tuple[list[tuple[Any, Any]], list[dict[str, Any]], str]] = {
    "not told": (
        [(None, None)] * 3,
        [NODES] * 3,
        "must be told which ranks share a node: start the",
    ),
    "uneven": (
        [(2, 0), (2, 1), (1, 0)],
        [NODES] * 3,
        "as many ranks on every node: rank 0 is on a node of 2",
    ),
    "in turn": ([(2, 0), (2, 0), (2, 1), (2, 1)], [NODES] * 4, UNNUMBERED.format(4, 1, 0)),
    "not whole": ([(2, 0), (2, 1), (2, 0)], [NODES] * 3, UNNUMBERED.format(3, 2, 0)),
    "disagree": (TWO_BY_TWO, [{}, NODES, {}, {}], "«vote_between='ranks'» where rank 1 has «vote_between='nodes'»"),
    "neither": (TWO_BY_TWO, [{"vote_between": "machines"}] * 4, "must be 'ranks' .* or 'nodes' .*, got 'machines'"),
    "no such node": (
        TWO_BY_TWO,
        [NODES | {"adversaries": {2: invert}}] * 4,
        r"adversaries must be nodes 0 to 1, got \[2\]",
    ),
}


@pytest.mark.parametrize(("places", "settings", "message"), CASES.values(), ids=CASES)
def test_refused_on_every_rank(places: Any, settings: Any, message: str, workers: Workers) -> None:
    said = workers.run(len(places), _refused, places, settings, False)
    assert len(set(said)) == 1
    assert re.search(message, said[0]), said[0]


def test_a_model_of_some_ranks(workers: Workers) -> None:
    first, second, *others = workers.run(4, _refused, TWO_BY_TWO, [NODES] * 4, True)
    assert (
        first
        == second
        == ("ValueError: vote_between='nodes' needs a model whose process group has all ranks, got some of them")
    )
    assert others == ["not asked"] * 2


def test_what_the_strategy_refuses() -> None:
    with pytest.raises(ValueError, match="a vote between nodes saves one file: leave out state_dict_type='sharded'"):
        MajorityVoteStrategy(vote_between="nodes", state_dict_type="sharded")
    with pytest.raises(ValueError, match="vote_between must be 'ranks'"):
        MajorityVoteStrategy(vote_between="machines")  # type: ignore[arg-type]
