"""`torch.compile` around a whole training step: what it can compile it does, and the vote takes place as ever."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote
from tests.workers import Workers

from .models import Record, judge, record, small_net
from .sharded import enabled, judge_places, records_of

SIGNUM: dict[str, Any] = {"betas": (0.5, 0.5), "verdict_momentum": 0.25}


def _data(t: int) -> torch.Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * t + dist.get_rank()))


def _train(model: Any, optimizer: Signum, backend: str) -> tuple[int, list[str]]:
    """Take four compiled steps; return how many graphs there were, and what was said."""
    graphs = list[Any]()

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        compiled: Any = torch._dynamo.lookup_backend(backend)(graph, inputs)
        return compiled

    @torch.compile(backend=counting)
    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        detached: torch.Tensor = loss.detach()
        return detached

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower on Python")  # torch about Python 3.13.0
        for t in range(4):
            step(_data(t))
    torch.compiler.reset()
    return len(graphs), [
        str(w.message) for w in caught if w.category is not DeprecationWarning
    ]  # those are torch's own


def _step(ddp: bool, backend: str) -> tuple[Record, int, list[str]]:
    torch.manual_seed(0)
    net = small_net()
    model = DistributedDataParallel(net) if ddp else net
    optimizer = Signum(net.parameters(), lr=0.0625, **SIGNUM)
    enable_majority_vote(model, optimizer)
    (one,) = record(optimizer)
    return one, *_train(model, optimizer, backend)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("ddp", [True, False])
def test_a_compiled_step(ddp: bool, backend: str, workers: Workers) -> None:
    runs = workers.run(2, _step, ddp, backend)
    judge([one for one, *_ in runs], **SIGNUM)
    for one, graphs, said in runs:
        assert len(one.parameters) == 4
        assert graphs
        assert not said


def _shards() -> tuple[Record, int, list[str]]:
    model, optimizer = enabled(2, {"plain": False}, **SIGNUM)
    return records_of(optimizer), *_train(model, optimizer, "eager")


@pytest.mark.nightly
def test_of_a_sharded_model(workers: Workers) -> None:
    runs = workers.run(4, _shards)
    judge_places([one for one, *_ in runs], 2, **SIGNUM)
    assert all(graphs and not said for _, graphs, said in runs)
