"""Every private name of torch and Lightning that is used, and who needs it; a test fails for each that moves.

Lightning is imported only by the functions that are about it.
"""

import inspect
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.variable import Variable
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
    from lightning.fabric.strategies.strategy import Strategy as FabricStrategy
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.device_mesh import DeviceMesh

_STATE_DICT = "torch.distributed.checkpoint.state_dict"

# Asked of every tensor in every step, so that a function around each would be felt.
is_zero_tensor = Tensor._is_zerotensor
"""Tells whether a tensor is zeros without memory; for `memory`."""
is_functional = torch._is_functional_tensor
"""Tells whether a tensor stands for one within functionalization; for `memory`."""
is_in_transform = torch._C._functorch.is_functorch_wrapped_tensor
"""Tells whether a tensor stands for one within `torch.func` transforms; for `memory`."""


def prefix_store(prefix: str) -> PrefixStore:
    """Return the store through which the ranks found each other, under a prefix; for `vote.failures`."""
    return PrefixStore(prefix, _get_default_store())


def backend(group: dist.ProcessGroup, device_type: str) -> str | None:
    """Return what a process group sends tensors of a kind of device with, None for nothing; for `vote.transport`.

    `dist.get_backend` names one for a group that has several.
    """
    try:
        return group._get_backend(torch.device(device_type)).name()
    except RuntimeError:
        return None


def timeout(group: dist.ProcessGroup) -> timedelta:
    """Return how long a process group waits for a lost rank; for `vote.nodes`, whose groups wait as long."""
    device = torch.device("cpu" if backend(group, "cpu") else "cuda")
    found: timedelta = group._get_backend(device).options._timeout
    return found


def queue_callback(function: Callable[[], None]) -> None:
    """Call a function after the backward pass that is going on; for `vote.local_gradients` and `vote.schedule`."""
    Variable._execution_engine.queue_callback(function)


def is_in_join(ddp_model: DistributedDataParallel) -> bool:
    """Tell whether DDP's `join()` would let ranks that are through go on alone; for `vote.local_gradients`."""
    config = ddp_model._join_config
    return bool(config.enable and not config.throw_on_early_termination)


def past_the_hook(ddp_model: DistributedDataParallel) -> dict[str, bool]:
    """Return by name what makes DDP average without its communication hook, and whether it is in use; for `enable`."""
    return {
        "delay_all_reduce_named_params": bool(ddp_model._delay_all_reduce_params),
        "mixed_precision (take torch.autocast)": ddp_model.mixed_precision is not None,
        'torch._dynamo.config.optimize_ddp = "python_reducer"': bool(ddp_model._use_python_reducer),
    }


def streaming_load(stream: IO[bytes]) -> Any:
    """Return the tensors and plain values that a stream brings, refusing code; for `elastic.transport`."""
    from torch.distributed._serialization import _streaming_load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # its tensors are only read
        return _streaming_load(stream, weights_only=True)  # type: ignore[arg-type]


def arrived(tensor: Tensor) -> Tensor:
    """Return a tensor once its values are there, where a collective may still bring them; for `sharding`."""
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place; for `vote.schedule`."""
    return tensor._version


def uncompiled(module: Any) -> Any:
    """Return the module that `torch.compile` took, itself where it took none; for `enable`."""
    return getattr(module, "_orig_mod", module)


def called_by_torch(function: str) -> bool:
    """Tell whether a function of `torch.distributed.checkpoint.state_dict` is among the callers.

    For `Signum.step`, which `_init_optim_state` calls to have the state made, and for `checkpoint.loading`: what
    `_load_optim_state_dict` loads is one rank's value of every tensor, of any rank.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == _STATE_DICT:
            return True
        frame = frame.f_back
    return False


def stands_for_no_optimizer(optimizer: object) -> bool:
    """Tell whether Lightning put it where a module has no optimizer; for `strategy`."""
    from lightning.pytorch.core.optimizer import _MockOptimizer

    return isinstance(optimizer, _MockOptimizer)


def ddp_options(strategy: "DDPStrategy") -> dict[str, Any]:
    """Return what Lightning's strategy hands on to `DistributedDataParallel`, to be added to; for `strategy`."""
    return strategy._ddp_kwargs


def check_ddp_options(strategy: "DDPStrategy | FabricDDPStrategy") -> None:
    """Make sure that DDP knows what a strategy would hand on to it; for `strategies` that wrap no model in it.

    Raises:
        TypeError: if not, as Python does.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    for name in strategy._ddp_kwargs:
        if name not in known:
            raise TypeError(f"{type(strategy).__name__} got an unexpected keyword argument {name!r}")


def set_parallel_sizes(strategy: "ModelParallelStrategy", data_parallel: int, tensor_parallel: int) -> None:
    """Set the sizes of the mesh that Lightning makes, once it is known how many ranks there are; for `strategies`."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = data_parallel, tensor_parallel


def show_mesh(strategy: "ModelParallelStrategy", mesh: "DeviceMesh") -> None:
    """Give Lightning's strategy and its module another mesh than the one that Lightning made; for `strategies`."""
    assert strategy.lightning_module is not None
    strategy._device_mesh = strategy.lightning_module._device_mesh = mesh


def leave_backward_alone(strategy: "FabricStrategy") -> None:
    """Tell Fabric that a strategy's backward pass sends nothing that could be left out; for `strategies.fabric`."""
    strategy._backward_sync_control = None


def is_local(path: Any) -> bool:
    """Tell whether Lightning takes a path for one on a local or mounted file system; for `strategy`."""
    from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

    return _is_local_file_protocol(path)


def trainer_of(module: "LightningModule") -> "Trainer | None":
    """Return a module's trainer, None where it has none; for `strategy`. The public property raises there."""
    return module._trainer


def logged_step(trainer: "Trainer") -> int:
    """Return the step by which Lightning logs; for the monitors."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_steps(trainer: "Trainer", global_step: int, logged_step: int) -> None:
    """Let a trainer have taken so many steps; for `strategies.elastic_vote`."""
    loop = trainer.fit_loop.epoch_loop
    progress = loop.automatic_optimization.optim_progress.optimizer.step.total
    if not trainer.lightning_module.automatic_optimization:
        progress = loop.manual_optimization.optim_step_progress.total
    progress.ready += global_step - progress.completed  # one more where it is in the middle of a step
    progress.completed = global_step
    loop._batches_that_stepped = logged_step
