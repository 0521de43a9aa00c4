"""Under a vote each rank keeps the gradients that its own backward passes computed, and only votes step on them."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.variable import Variable
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_queue_callback: Callable[[Callable[[], None]], None] = Variable._execution_engine.queue_callback
"""Calls a function after the backward pass that is going on; torch has no public name for it."""


def keep_local(ddp_model: DistributedDataParallel, *, guard: bool) -> None:
    """Let DDP hand every rank its own gradients back; may be called again for the same model.

    Args:
        ddp_model: gets a communication hook.
        guard: whether to refuse the step of any optimizer on the model's parameters that does not vote: its gradients
            differ from rank to rank. The guard goes with the model, or with `release`.

    Raises:
        RuntimeError: if the model has another communication hook.
    """
    if ddp_model not in _HOOKED:
        try:
            ddp_model.register_comm_hook(_MadeUp(), _hand_back)
        except RuntimeError as error:
            raise RuntimeError(
                "a majority vote takes the place of DDP's communication hook, and this model has one: wrap the model "
                "anew, without register_comm_hook"
            ) from error
        _HOOKED[ddp_model] = None
    if guard and _HOOKED[ddp_model] is None:
        handle = register_optimizer_step_pre_hook(_Guard(ddp_model))
        _HOOKED[ddp_model] = weakref.finalize(ddp_model, handle.remove)


def release(ddp_model: DistributedDataParallel) -> None:
    """Let any optimizer step on the model's parameters again, once it is no longer trained by votes."""
    guard = _HOOKED.get(ddp_model)
    if guard is not None:
        guard()
        _HOOKED[ddp_model] = None


_HOOKED: weakref.WeakKeyDictionary[DistributedDataParallel, Any] = weakref.WeakKeyDictionary()
"""The models with our communication hook, each with what removes its guard."""


class _MadeUp(list[Tensor]):
    """The parameters to which DDP is about to give a gradient that no backward pass of this rank computed."""

    def take_back(self, last: bool) -> None:
        """Remove the gradients that DDP has made up.

        Args:
            last: whether DDP is through with the backward pass; until then it may still make up some.
        """
        for p in self:
            p.grad = None
        if last:
            self.clear()


def _hand_back(made_up: _MadeUp, bucket: GradBucket) -> Future[Tensor]:
    """Return a bucket as it is.

    Once a backward pass is over, DDP gives a gradient of zeros to each parameter that this rank did not use but
    another rank did (`find_unused_parameters`, a static graph, a gradient that is undefined). It would vote with its
    momentum, where one without a gradient abstains. A parameter that has no gradient by now gets one from DDP alone.
    """
    parameters = bucket.parameters()
    known = {id(p) for p in parameters}
    made_up[:] = [p for p in made_up if id(p) not in known] + [p for p in parameters if p.grad is None]
    if made_up:  # queued twice, to come behind DDP's own last touch, which may be queued behind this
        take_back = partial(made_up.take_back, bucket.is_last())
        _queue_callback(lambda: _queue_callback(take_back))
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future


class _Guard:
    """Refuses a step on the parameters of a model that votes, unless it is a vote."""

    def __init__(self, ddp_model: DistributedDataParallel) -> None:
        self._model = weakref.ref(ddp_model)
        self._parameters = {id(p) for p in ddp_model.module.parameters()}

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        model = self._model()
        if model is None or not self._holds(p for group in optimizer.param_groups for p in group["params"]):
            return
        kind = type(optimizer).__name__
        if getattr(optimizer, "exchange", None) is None:
            raise RuntimeError(
                f"{kind} steps on parameters of a model that votes, and has no vote: their gradients are each rank's "
                "own, and the ranks would drift apart. Pass a Signum of these parameters to enable_majority_vote "
                "together with the model"
            )
        join = model._join_config
        if join.enable and not join.throw_on_early_termination:
            raise RuntimeError(
                "DDP.join() cannot be used with a majority vote: a rank that is through would not answer the votes of "
                "the others. Give every rank the same number of batches (DistributedSampler, drop_last=True), or call "
                "join(throw_on_early_termination=True), which ends all ranks when the first is through"
            )

    def _holds(self, parameters: Iterable[Tensor]) -> bool:
        return any(id(p) in self._parameters for p in parameters)
