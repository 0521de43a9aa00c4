"""Every private name of torch and Lightning that the package touches is there, and means what it is taken for."""

import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities import cloud_io
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core import optimizer as lightning_optimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed import _serialization, distributed_c10d
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.nn.parallel import DistributedDataParallel

import signsgd_lightning
from signsgd_lightning import _compat
from tests.workers import Workers

VERSIONS = f"torch {torch.__version__}, Lightning {lightning.__version__}"

NAMES: dict[str, tuple[Any, str]] = {
    # name: (owner, who needs it)
    "_get_default_store": (distributed_c10d, "_compat.prefix_store"),
    "_get_backend": (dist.ProcessGroup, "_compat.backend and _compat.timeout"),
    "_execution_engine": (torch.autograd.Variable, "_compat.queue_callback"),
    "_streaming_load": (_serialization, "_compat.streaming_load"),
    "_is_zerotensor": (torch.Tensor, "memory, as _compat.is_zero_tensor"),
    "_is_functional_tensor": (torch, "memory, as _compat.is_functional"),
    "is_functorch_wrapped_tensor": (torch._C._functorch, "memory, as _compat.is_in_transform"),
    "_init_optim_state": (checkpoint, "Signum.step, by _compat.called_by_torch"),
    "_load_optim_state_dict": (checkpoint, "checkpoint.loading, by _compat.called_by_torch"),
    "_MockOptimizer": (lightning_optimizer, "_compat.stands_for_no_optimizer"),
    "_is_local_file_protocol": (cloud_io, "_compat.is_local"),
    "_trainer": (LightningModule(), "_compat.trainer_of"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    owner, needed_by = NAMES[name]
    assert hasattr(owner, name), f"{name} is gone from {VERSIONS}; who needs it: {needed_by}"


def _of_a_ddp_model() -> list[Any]:
    model = DistributedDataParallel(nn.Linear(1, 1))
    assert not _compat.is_in_join(model)
    names = ("_join_config", "_delay_all_reduce_params", "mixed_precision", "_use_python_reducer")
    gone = [name for name in names if not hasattr(model, name)]
    world = dist.group.WORLD
    assert world is not None
    with model.join():
        joined = _compat.is_in_join(model)
    return [
        gone,
        joined,
        list(_compat.past_the_hook(model).values()),
        _compat.backend(world, "cpu"),
        _compat.backend(world, "xpu"),
        _compat.timeout(world).total_seconds(),
        type(_compat.prefix_store("a")).__name__,
    ]


def test_of_ddp_and_process_groups(workers: Workers) -> None:
    (found,) = workers.run(1, _of_a_ddp_model, group_timeout=17.0)
    assert found == [[], True, [False] * 3, "gloo", None, 17.0, "PrefixStore"], VERSIONS


def test_queue_callback() -> None:
    """It runs when the backward pass is over, whichever hook asks for it."""
    seen = list[bool]()
    x: Any = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: _compat.queue_callback(lambda: seen.append(x.grad is not None)))
    (2 * x).backward()
    assert seen == [True]


def test_tensors() -> None:
    assert _compat.is_zero_tensor(torch._efficientzerotensor(3))
    assert not _compat.is_zero_tensor(torch.zeros(3))
    assert not _compat.is_in_transform(torch.zeros(3))
    assert not _compat.is_functional(torch.zeros(3))

    def in_transform(x: torch.Tensor) -> torch.Tensor:
        assert _compat.is_in_transform(x)
        return x

    def functional(x: torch.Tensor) -> torch.Tensor:
        assert _compat.is_functional(x)
        return x

    torch.func.vmap(in_transform)(torch.zeros(3))
    torch.func.functionalize(functional)(torch.zeros(3))


def test_version() -> None:
    x = torch.zeros(3)
    before = _compat.version(x)
    x.add_(1)
    assert _compat.version(x) == before + 1


def test_uncompiled() -> None:
    module = nn.Linear(1, 1)
    assert _compat.uncompiled(torch.compile(module)) is module
    assert _compat.uncompiled(module) is module


def test_called_by_torch() -> None:
    """Torch makes an optimizer's state by a step that is none."""
    called = []

    class Asks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            called.append(_compat.called_by_torch("_init_optim_state"))
            return super().step(closure)

    model = nn.Linear(1, 1)
    optimizer = Asks(model.parameters(), lr=0.1, momentum=0.5)
    checkpoint.get_optimizer_state_dict(model, optimizer)
    model(torch.ones(1)).backward()
    optimizer.step()
    assert called == [True, False]


def test_lightning(tmp_path: Path) -> None:
    assert _compat.stands_for_no_optimizer(lightning_optimizer._MockOptimizer())
    assert not _compat.stands_for_no_optimizer(torch.optim.SGD([torch.zeros(1)]))
    assert _compat.is_local(str(tmp_path))
    assert not _compat.is_local("s3://bucket/file")
    module = LightningModule()
    assert _compat.trainer_of(module) is None
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module.trainer = trainer
    assert _compat.trainer_of(module) is trainer
    assert _compat.logged_step(trainer) == 0
    trainer.strategy.connect(module)
    _compat.set_steps(trainer, 5, 7)
    assert (trainer.global_step, _compat.logged_step(trainer)) == (5, 7)
    module.automatic_optimization = False
    assert trainer.global_step == 0
    _compat.set_steps(trainer, 3, 9)
    assert (trainer.global_step, _compat.logged_step(trainer)) == (3, 9)
    assert _compat.ddp_options(DDPStrategy(bucket_cap_mb=3)) == {"bucket_cap_mb": 3}


def test_no_other_module_touches_a_private_name() -> None:
    """Of an attribute of something else than self, cls, super() or a module of ours."""
    ours = {"_compat", "__main__"}
    for path in Path(signsgd_lightning.__file__).parent.rglob("*.py"):
        if path.name == "_compat.py":
            continue
        code = re.sub(r'"""(?:.|\n)*?"""|"[^"\n]*"|#.*', "", path.read_text())
        found = {
            f"{owner}.{name}"
            for owner, name in re.findall(r"([\w\])]+)\.(_[a-z]\w*)", code)
            if owner not in ("self", "cls") and name not in ours and f"def {name}" not in code
        }
        imported = set(re.findall(r"from (?:torch|lightning)[\w.]* import .*\b(_\w+)", code))
        assert not found | imported, f"{path.name} touches private names; _compat.py is the place"
