"""`ShardedMajorityVoteStrategy`: Lightning's `configure_model` shards inside a worker, and the workers vote."""

import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from signsgd_lightning import GeometryMonitor, ShardedMajorityVoteStrategy, VoteMonitor
from tests.workers import Workers

from .models import Net, Record, array, record, trainer
from .sharded import SIGNUM, judge_places


class Sharded(Net):
    """Sharded as Lightning's documentation shards; the seed differs from rank to rank."""

    def __init__(self, tensor: bool = False, **signum: Any) -> None:
        super().__init__(**{**SIGNUM, **signum})
        self.tensor = tensor

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        if self.tensor:
            plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """Record anew, now that all have rank 0's parameters."""
        optimizer: Any = self.trainer.optimizers[0]
        self.records = record(optimizer)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.seen = [*getattr(self, "seen", []), array(batch[0])]


def _strategy(**sizes: Any) -> Any:
    return ShardedMajorityVoteStrategy(**{"data_parallel_size": 2, **sizes})


def _fit(model: Any, sizes: dict[str, Any], settings: dict[str, Any]) -> tuple[Record, list[bytes], float]:
    """Train; return the record, the batches that were seen, and the bytes of a step between copies."""
    module = model()
    run: Any = trainer(strategy=_strategy(**sizes), callbacks=[VoteMonitor()], log_every_n_steps=1, **settings)
    run.fit(module)
    return module.records[0], [x.tobytes() for x in module.seen], float(run.callback_metrics["vote/bytes_per_step"])


def test_two_replicas_of_two_shards(workers: Workers) -> None:
    """Every place's votes are the reference's, also of clipped gradients; each rank has batches of its own."""
    runs = workers.run(4, _fit, Sharded, {}, {"gradient_clip_val": 0.5})
    judge_places([one for one, *_ in runs], 2, **SIGNUM)
    (sent,) = {sent for *_, sent in runs}
    assert sent > 0, "VoteMonitor counts the bytes between copies"
    batches = [batch for _, seen, _ in runs for batch in seen]
    assert len(batches) == len(set(batches)) == 8, "32 samples, 4 ranks, batches of 4"


@pytest.mark.nightly
def test_three_replicas(workers: Workers) -> None:
    judge_places([one for one, *_ in workers.run(6, _fit, partial(Sharded, samples=48), {}, {})], 3, **SIGNUM)


@pytest.mark.nightly
def test_with_tensor_parallel(workers: Workers) -> None:
    """Ranks of a tensor-parallel group have the same batches."""
    runs = workers.run(8, _fit, partial(Sharded, tensor=True), {"tensor_parallel_size": 2}, {})
    judge_places([one for one, *_ in runs], 2, **SIGNUM)
    assert runs[0][1] == runs[1][1] != runs[2][1]


def _whole(run: Any) -> tuple[list[bytes], list[Any]]:
    """Return this copy's parameters and momenta, put together from its shards."""
    (optimizer,) = run.optimizers
    parameters: list[Any] = optimizer.param_groups[0]["params"]
    momenta: list[Any] = [optimizer.state.get(p, {}).get("momentum", torch.zeros_like(p)) for p in parameters]
    return [array(p.full_tensor()).tobytes() for p in parameters], [array(m.full_tensor()) for m in momenta]


class _Noting(Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if (trainer.current_epoch, index) == (1, 0):
            self.seen = _whole(trainer)


def _save(path: str, model: Any = Sharded) -> tuple[Any, Any]:
    """Train two epochs; return what was there when the first was saved, and in the end."""
    noting = _Noting()
    saving = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    run: Any = trainer(strategy=_strategy(), max_epochs=2, enable_checkpointing=True, callbacks=[saving, noting])
    run.fit(model())
    return noting.seen, _whole(run)


def _resume(path: str, sizes: dict[str, Any], model: Any = Sharded) -> tuple[Any, Any, list[str]]:
    noting = _Noting()
    run: Any = trainer(strategy=_strategy(**sizes), max_epochs=2, callbacks=[noting])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model(), ckpt_path=path)
    return noting.seen, _whole(run), [str(w.message) for w in caught if "momentum" in str(w.message)]


def _refused(path: str) -> str:
    try:
        _resume(path, {})
    except ValueError as error:
        return str(error)
    return "nothing"


def _same(one: tuple[list[bytes], list[Any]], other: tuple[list[bytes], list[Any]]) -> bool:
    momenta = zip(one[1], other[1], strict=True)
    return one[0] == other[0] and all(np.array_equal(x, y) for x, y in momenta)


def test_checkpoints(tmp_path: Path, workers: Workers) -> None:
    """A directory, whole, with every copy's momenta; they open on more copies and on fewer, by the rule of all."""
    saved = workers.run(4, _save, str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    path = str(tmp_path / "epoch=0.ckpt")
    momenta = [saved[0][0][1], saved[2][0][1]]
    assert not any(np.array_equal(x, y) for x, y in zip(*momenta, strict=True)), "momenta are each copy's own"
    for (then, later), (loaded, end, said) in zip(saved, workers.run(4, _resume, path, {}), strict=True):
        assert _same(loaded, then)
        assert _same(end, later)
        assert not said
    for rank, (loaded, _, said) in enumerate(workers.run(4, _resume, path, {"data_parallel_size": 1})):
        assert _same(loaded, (saved[0][0][0], momenta[rank % 2])), "copy i goes on from copy i mod 2"
        assert not said
    for loaded, _, said in workers.run(2, _resume, path, {"replicate_size": 1}):
        assert _same(loaded, (saved[0][0][0], [(x + y) / 2 for x, y in zip(*momenta, strict=True)])), "the mean"
        assert not said
    shutil.rmtree(tmp_path / "epoch=0.ckpt" / "worker1of2")
    for refused in workers.run(4, _refused, path):
        assert f"{path} has no folder worker1of2 with the momenta of copy 1: " in refused


def test_three_copies_become_two(tmp_path: Path, workers: Workers) -> None:
    """One of them goes on from two, the other from one."""
    saved = workers.run(6, _save, str(tmp_path))
    old = [saved[2 * copy][0][1] for copy in range(3)]
    path = str(tmp_path / "epoch=0.ckpt")
    for rank, (loaded, *_) in enumerate(workers.run(4, _resume, path, {})):
        momenta = [(x + y) / 2 for x, y in zip(old[0], old[2], strict=True)] if rank < 2 else old[1]
        assert _same(loaded, (saved[0][0][0], momenta))


class _Spare(Sharded):
    """Has a parameter that no step uses, and momenta of 2 bytes."""

    def __init__(self) -> None:
        super().__init__(momentum_dtype=torch.bfloat16)
        self.net[0].spare = nn.Parameter(torch.ones(3))


def test_narrow_momenta_and_an_unused_parameter(tmp_path: Path, workers: Workers) -> None:
    saved = workers.run(4, _save, str(tmp_path), _Spare)
    resumed = workers.run(4, _resume, str(tmp_path / "epoch=0.ckpt"), {}, _Spare)
    for (then, later), (loaded, end, _) in zip(saved, resumed, strict=True):
        assert _same(loaded, then)
        assert _same(end, later)


class _Stops(Sharded):
    def training_step(self, batch: Any, index: int) -> Any:
        if index == 1:
            raise RuntimeError("stops here")
        return super().training_step(batch, index)


class _Plain(Sharded):
    def configure_model(self) -> None:
        """Shard nothing."""


class _All(Sharded):
    def configure_model(self) -> None:
        strategy: Any = self.trainer.strategy
        fully_shard(self.net, mesh=strategy.device_mesh["replicate", "data_parallel"])


class _Adam(Sharded):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def _lightnings(path: str) -> None:
    """Save by Lightning's own strategy, which has no vote; then let copies go on from it."""
    own = ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1)
    run = trainer(strategy=own)
    run.fit(Sharded())
    run.save_checkpoint(path)
    trainer(strategy=_strategy()).fit(Sharded(), ckpt_path=path)


def _weights(path: str) -> None:
    """Save them alone, under a name that ends as a directory's may."""
    _fitted().save_checkpoint(f"{path}/", weights_only=True)
    trainer(strategy=_strategy()).fit(Sharded(), ckpt_path=path)


class _Placed(Sharded):
    def __init__(self, data: Path = Path("data")) -> None:
        super().__init__()
        self.save_hyperparameters()


def _placed(path: str) -> None:
    run = trainer(strategy=_strategy())
    run.fit(_Placed())
    run.save_checkpoint(path)
    trainer(strategy=_strategy()).fit(_Placed(), ckpt_path=path)


def _stops(path: str) -> None:
    trainer(strategy=_strategy(), enable_checkpointing=True, callbacks=[OnExceptionCheckpoint(path, "last")]).fit(
        _Stops()
    )


def _fitted() -> Any:
    run = trainer(strategy=_strategy())
    run.fit(Sharded())
    return run


def _run(model: Any, **settings: Any) -> None:
    trainer(strategy=_strategy(**settings)).fit(model())


def _by_ddp(_: str) -> None:
    class Whole(Sharded):
        def configure_model(self) -> None:
            fully_shard(self.net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    trainer().fit(Whole())


MISTAKES: dict[str, tuple[Any, str]] = {
    "sizes": (
        lambda _: _run(Sharded, data_parallel_size=3),
        "replicate_size=1, data_parallel_size=3 and tensor_parallel_size=1 are 3 ranks, and there are 4: let them",
    ),
    "no directory": (
        lambda _: _fitted().save_checkpoint("s3://bucket/file"),
        "a sharded checkpoint must be a directory on a file system, without storage_options, got s3://bucket/file",
    ),
    "size 0": (lambda _: _run(Sharded, replicate_size=0), "replicate_size must be a whole number of 1 or more, got 0"),
    "one file": (lambda _: _run(Sharded, save_distributed_checkpoint=False), "makes one file with the momenta of one"),
    "not sharded": (lambda _: _run(_Plain), "configure_model of _Plain sharded nothing, and a copy of the model has 2"),
    "all dimensions": (lambda _: _run(_All), "which FSDP shards or averages"),
    "AdamW": (lambda _: _run(_Adam), "a majority vote needs signsgd_lightning.Signum, optimizer 0 is AdamW"),
    "Lightning's checkpoint": (_lightnings, "has no momenta of sharded copies, since another strategy wrote it or "),
    "weights alone": (_weights, "file has no momenta of sharded copies, since another strategy wrote it or weights_on"),
    "a file to be trusted": (_placed, "holds pathlib.PosixPath, which torch loads only from a file that you trust"),
    "geometry of shards": (
        lambda _: trainer(strategy=_strategy(), callbacks=[GeometryMonitor()]).fit(Sharded()),
        "GeometryMonitor takes ordinary tensors, and parameter 0 is a DTensor placed as S(0) over 'data_parallel': a ",
    ),
    "sizes differ": (
        lambda _: _run(Sharded, data_parallel_size=2 if dist.get_rank() else 4),
        "rank 0 has «replicate_size=1, data_parallel_size=4, tensor_parallel_size=1» where rank 1 has «repl",
    ),
    "another strategy": (_by_ddp, "net.0.weight is a DTensor placed as S(0) over 0: take ShardedMajorityVoteStrategy"),
    "an exception": (_stops, "stops here"),
}


def _said(name: str, path: str) -> str:
    try:
        MISTAKES[name][0](path)
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return "nothing"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, tmp_path: Path, workers: Workers) -> None:
    said = workers.run(4, _said, name, str(tmp_path / "file"))
    assert MISTAKES[name][1] in said[0], said[0]
    assert "nothing" not in said
    assert not list(tmp_path.rglob("*.part"))
