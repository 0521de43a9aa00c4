"""Fabric's loops by hand: votes, accumulation, clipping, and files with every worker's state."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from signsgd_lightning import FabricLocalVoteStrategy, FabricMajorityVoteStrategy, Signum, enable_majority_vote
from tests.workers import Workers

from .models import Record, judge, record, small_net
from .sharded import judge_places, records_of

SIGNUM: dict[str, Any] = {"betas": (0.5, 0.5), "verdict_momentum": 0.25}


def _fabric(strategy: Any = "majority_vote", **options: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, **options)
    fabric.launch()
    return fabric


def _set_up(fabric: Fabric, seed: int = 0) -> tuple[Any, Any, list[Record]]:
    torch.manual_seed(seed)
    net = small_net()
    optimizer = Signum(net.parameters(), lr=0.0625, **SIGNUM)
    records = record(optimizer)
    return *fabric.setup(net, optimizer), records


def _backward(fabric: Fabric, model: Any, t: int) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * t + dist.get_rank()))
    fabric.backward((model(x) - x.sum(1, keepdim=True)).square().mean())


def _bits(model: Any, optimizer: Any) -> list[bytes]:
    tensors = [*model.parameters(), *(v for entries in optimizer.state.values() for v in entries.values())]
    return [x.detach().numpy().tobytes() for x in tensors]


def _train(path: str, steps: range, options: dict[str, Any]) -> tuple[list[Record], list[list[bytes]], list[float]]:
    """Train with accumulation and clipping, from a file if there is one, and save; return records, states, norms."""
    fabric = _fabric(**options)
    model, optimizer, records = _set_up(fabric, seed=steps.start)
    counts, norms, bits = {"steps": 0}, [], []
    if steps.start:
        state = {"model": model, "optimizer": optimizer, **counts}
        assert fabric.load(path, state) == {}
        assert (state["steps"], optimizer.t) == (steps.start, steps.start)
        bits.append(_bits(model, optimizer))
        records = record(optimizer.optimizer)
    for t in steps:
        optimizer.zero_grad()
        with fabric.no_backward_sync(model):
            _backward(fabric, model, t + 50)
        _backward(fabric, model, t)
        norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=0.5)))  # type: ignore[arg-type]
        optimizer.step()
    if not steps.start:
        fabric.save(path, {"model": model, "optimizer": optimizer, "steps": len(steps)})
        bits.append(_bits(model, optimizer))
    return records, bits, norms


def test_votes_saves_and_goes_on(tmp_path: Path, workers: Workers) -> None:
    path = str(tmp_path / "last.ckpt")
    first = workers.run(2, _train, path, range(2), {})
    judge([records[0] for records, *_ in first], **SIGNUM)
    assert first[0][2] != first[1][2], "each rank clips its own gradient"
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    second = workers.run(2, _train, path, range(2, 4), {})
    for (_, saved, _), (_, loaded, _) in zip(first, second, strict=True):
        assert saved == loaded
    assert first[0][1] != first[1][1], "momenta are each worker's own"
    ends = [records[0].end for records, *_ in second]
    assert all((x == y).all() for x, y in zip(*ends, strict=True))


def _half() -> list[Record]:
    fabric = _fabric(precision="bf16-mixed")
    model, optimizer, records = _set_up(fabric)
    for t in range(2):
        optimizer.zero_grad()
        _backward(fabric, model, t)
        optimizer.step()
    return records


def test_mixed_precision(workers: Workers) -> None:
    judge([records[0] for records in workers.run(3, _half)], **SIGNUM)


def _local(path: str) -> list[Any]:
    """Two rounds of two AdamW steps; save after a third step, which closes its round; load into a new one."""
    said = list[Any]()
    bits = list[list[bytes]]()
    for seed in (0, 1):
        fabric = _fabric(FabricLocalVoteStrategy(sync_every=2))
        torch.manual_seed(seed)
        net = small_net()
        model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.1))
        strategy: Any = fabric.strategy
        state = {"model": model, "optimizer": optimizer}
        if seed:
            fabric.load(path, state)
        for t in range(0 if seed else 3):
            optimizer.zero_grad()
            _backward(fabric, model, t)
            optimizer.step()
        if not seed:
            fabric.save(path, state)
        said.append(strategy.local_steps.outer.rounds)
        bits.append(_bits(model, optimizer))
    return [*said, bits[0] == bits[1], bits[0][: len(list(net.parameters()))], bits[0]]


def _two_models(path: str) -> list[bool]:
    """Save within a round of each of two models; tell whether its round is open then."""
    fabric = _fabric(FabricLocalVoteStrategy(sync_every=4))
    nets, rounds = [small_net(), small_net()], []
    for net in nets:
        model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.1))
        strategy: Any = fabric.strategy
        rounds.append(strategy.local_steps)
        _backward(fabric, model, 0)
        optimizer.step()
    fabric.save(path, {"first": nets[0], "second": nets[1]})
    return [local.is_open for local in rounds]


def _again(path: str) -> list[bool]:
    """Set a model up with another optimizer, and save within a round of that; tell whether rounds are open then."""
    fabric, net, rounds = _fabric(FabricLocalVoteStrategy(sync_every=4)), small_net(), []
    for lr in (0.1, 0.05):
        model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=lr))
        strategy: Any = fabric.strategy
        rounds.append(strategy.local_steps)
        for t in range(2):
            _backward(fabric, model, t)
            optimizer.step()
            optimizer.zero_grad()
        if lr == 0.1:
            rounds[0].close_round()
    fabric.save(path, {"model": model})
    return [local.is_open for local in rounds]


def test_a_model_that_is_set_up_again_has_its_new_rounds_closed(tmp_path: Path, workers: Workers) -> None:
    assert workers.run(2, _again, str(tmp_path / "again.ckpt"), group_timeout=10) == [[False, False]] * 2


def test_saving_closes_the_rounds_of_all_models(tmp_path: Path, workers: Workers) -> None:
    assert workers.run(2, _two_models, str(tmp_path / "two.ckpt")) == [[False, False]] * 2


def test_local_vote(tmp_path: Path, workers: Workers) -> None:
    first, second = workers.run(2, _local, str(tmp_path / "local.ckpt"))
    assert first[:3] == second[:3] == [2, 2, True]
    assert first[3] == second[3], "parameters are the same on all"
    assert first[4] != second[4], "AdamW's moments are each rank's own"


def _loads_within_a_round(path: str) -> list[bool]:
    """Load one layer within a round, then the model; return whether what was loaded is there when the round closes."""
    fabric = _fabric(FabricLocalVoteStrategy(sync_every=100))
    net: Any = small_net()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    saved = [x.detach().clone() for x in net.parameters()]
    fabric.save(path, {"model": model, "layer": net[0]})
    strategy: Any = fabric.strategy
    same = []
    for t, state in enumerate(({}, {"layer": net[0]}, {"model": model})):
        _backward(fabric, model, t)
        optimizer.step()
        if state:
            fabric.load(path, state)
        strategy.local_steps.close_round()
        same += [x.equal(y) for x, y in zip(net.parameters(), saved, strict=True)]
    return same


def test_local_vote_loads_within_a_round(tmp_path: Path, workers: Workers) -> None:
    told = workers.run(2, _loads_within_a_round, str(tmp_path / "local.ckpt"))
    assert told == [[False] * 4 + [True, True, False, False] + [True] * 4] * 2, "the other layer goes on by the vote"


def _misfits(path: str) -> list[tuple[str, bool]]:
    """Load files of which one object does not fit; return what was said, and whether all others are as they were."""
    fabric = _fabric()
    torch.manual_seed(0)
    net: Any = small_net()
    model, *optimizers = fabric.setup(net, *(Signum(net[k].parameters(), lr=0.0625, **SIGNUM) for k in (0, 2)))
    state = {"model": model, "first": optimizers[0], "second": optimizers[1], "count": 0}
    fabric.save(path, state)
    adam = torch.optim.AdamW(net[2].parameters()).state_dict()
    fabric.save(f"{path}.adam", {**state, "second": adam})
    fabric.save(f"{path}.groups", {**state, "second": Signum([net[2].weight]).state_dict()})
    fabric.save(f"{path}.model", {**state, "model": nn.Linear(2, 2)})
    _backward(fabric, model, 0)
    for optimizer in optimizers:
        optimizer.step()
    before, said = [_bits(model, optimizer) for optimizer in optimizers], []
    for name in ("adam", "groups", "model"):
        try:
            fabric.load(f"{path}.{name}", {**state, "count": 1})
        except (RuntimeError, ValueError) as error:
            said.append((str(error), [_bits(model, optimizer) for optimizer in optimizers] == before))
    return said


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_found_before_anything_is_loaded(tmp_path: Path, workers: Workers) -> None:
    for (adam, *same), (groups, *also), (model, *too) in workers.run(2, _misfits, str(tmp_path / "file")):
        assert "this is the state of" in adam
        assert groups.startswith("the state is of groups of [1] parameters, and the optimizer has [2]")
        assert "size mismatch" in model or "Missing key" in model
        assert [*same, *also, *too] == [True] * 3


def _cut(model: Any, mesh: Any) -> Any:
    return fully_shard(model, mesh=mesh["tensor_parallel"])


def _sharded() -> Record:
    """By Fabric's own strategy, whose mesh has a dimension for the vote."""
    fabric = _fabric(ModelParallelStrategy(_cut, data_parallel_size=2, tensor_parallel_size=2))
    torch.manual_seed(dist.get_rank())
    model = fabric.setup_module(small_net())
    optimizer: Any = fabric.setup_optimizers(Signum(model.parameters(), lr=0.0625, **SIGNUM))
    strategy: Any = fabric.strategy
    enable_majority_vote(model, optimizer, mesh=strategy.device_mesh["data_parallel"])
    one = records_of(optimizer.optimizer)
    for t in range(2):
        optimizer.zero_grad()
        _backward(fabric, model, t)
        optimizer.step()
    return one


def test_a_sharded_model(workers: Workers) -> None:
    judge_places(workers.run(4, _sharded), 2, **SIGNUM)


def _by_name() -> list[str]:
    names = ("majority_vote", "local_vote", "majority_vote_find_unused_parameters_true")
    return [type(_fabric(name).strategy).__name__ for name in names]


def test_strategies_by_name(workers: Workers) -> None:
    majority, local = FabricMajorityVoteStrategy.__name__, FabricLocalVoteStrategy.__name__
    assert workers.run(1, _by_name) == [[majority, local, majority]]


def _mistakes(path: str) -> dict[str, str]:
    fabric = _fabric()
    model, optimizer, _ = _set_up(fabric)
    other = nn.Linear(1, 1)
    Path(f"{path}{dist.get_rank()}").write_bytes(b"no checkpoint")
    fabric.save(path, {"model": model})
    fabric.save(f"{path}.placed", {"folder": Path()})

    def alone() -> None:
        fabric.setup_optimizers(Signum(other.parameters()))

    def adam() -> None:
        fabric.setup(other, torch.optim.AdamW(other.parameters()))

    def differ() -> None:
        fabric.setup(*_linear(4 + dist.get_rank()))

    def model_alone() -> None:
        wrapped: Any = fabric.setup_module(nn.Linear(2, 1))
        mine = Signum(wrapped.parameters())
        wrapped(torch.ones(1, 2)).sum().backward()
        mine.step()

    def cut() -> None:
        net = nn.Linear(4, 2)
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        fabric.setup(net)

    def no_file() -> None:
        fabric.load(f"{path}{dist.get_rank()}", {"model": model})

    def placed() -> None:
        fabric.load(f"{path}.placed", {"folder": None})

    def no_optimizer() -> None:
        fabric.load(path, {"optimizer": optimizer})

    said = {}
    for mistake in (alone, adam, differ, model_alone, cut, no_file, placed, no_optimizer):
        try:
            mistake()
        except (RuntimeError, TypeError, KeyError) as error:
            said[mistake.__name__] = str(error)
    return said


def _linear(size: int) -> tuple[nn.Module, Signum]:
    net = nn.Linear(size, 1)
    return net, Signum(net.parameters())


@pytest.mark.filterwarnings("ignore")
def test_mistakes(tmp_path: Path, workers: Workers) -> None:
    for said in workers.run(2, _mistakes, str(tmp_path / "file")):
        assert said["alone"].endswith("set both up together, by model, optimizer = fabric.setup(model, optimizer)")
        assert said["adam"].startswith("a majority vote needs signsgd_lightning.Signum, optimizer 0 is AdamW")
        assert "rank 0 has «weight: shape (1, 4)" in said["differ"]
        assert said["model_alone"].startswith("Signum steps on parameters of a model that votes, and has no vote")
        assert said["cut"].startswith("FabricMajorityVoteStrategy takes ordinary models, and weight is a DTensor")
        assert "is not a whole checkpoint as fabric.save writes it" in said["no_file"]
        assert "holds pathlib.PosixPath" in said["placed"]
        assert "fabric.load(…, weights_only=False)" in said["placed"]
        assert "has no 'optimizer', only 'model'" in said["no_optimizer"]
