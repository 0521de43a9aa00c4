"""Under a vote each rank keeps the gradients that its own backward passes computed, and only votes step on them."""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .._compat import is_in_join, queue_callback


def keep_local(model: nn.Module, *, guard: bool) -> None:
    """Leave every rank its own gradients; may be called again for the same model.

    Args:
        model: gets a communication hook by which DDP hands every bucket back, if it is a DDP model.
        guard: whether to refuse the step of any optimizer on the model's parameters that does not vote: its gradients
            differ from rank to rank. The guard goes with the model, or with `release`.

    Raises:
        RuntimeError: if the model has another communication hook.
    """
    _remove_left()
    if model not in _GUARDS:
        if isinstance(model, DistributedDataParallel):
            _hook(model)
        _GUARDS[model] = None
    if guard and _GUARDS[model] is None:
        handles = [register_optimizer_step_pre_hook(_Guard(model)), *_watch_wrappers(model, _VOTES)]
        _GUARDS[model] = _while_alive(model, handles)


def release(model: nn.Module) -> None:
    """Let any optimizer step on the model's parameters again, once it is no longer trained by votes."""
    guard = _GUARDS.get(model)
    if guard is not None:
        guard()
        _GUARDS[model] = None


def refuse_other_wrappers(model: nn.Module, why: str) -> Callable[[], None]:
    """Refuse the forward pass of any DDP model of the same parameters, there or yet to come: it would average.

    Args:
        model: that was enabled, and may have them in DDP itself.
        why: it is refused, and what to do.

    Returns:
        What ends it; so does the end of the model.
    """
    return _while_alive(model, _watch_wrappers(model, why))


def _while_alive(model: nn.Module, handles: list[RemovableHandle]) -> Callable[[], None]:
    """Return what removes hooks, once no pass through them is going on where the model goes first."""
    gone = weakref.finalize(model, _LEFT.extend, handles)

    def end() -> None:
        gone()
        _remove_left()

    return end


_VOTES = (
    "this DistributedDataParallel model averages gradients of parameters that vote: call enable_majority_vote with it "
    "and their optimizers, or train through the model that was enabled"
)

_GUARDS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""The models whose gradients are left local, each with what removes its guard."""

_LEFT: list[RemovableHandle] = []
"""Hooks of models that are gone. A model may be collected while torch goes through its hooks, which must not change
then; a hook without its model does nothing."""


def _remove_left() -> None:
    remove_hooks(_LEFT)
    _LEFT.clear()


def _hook(ddp_model: DistributedDataParallel) -> None:
    try:
        ddp_model.register_comm_hook(_MadeUp(), _hand_back)
    except RuntimeError as error:
        raise RuntimeError(
            "a majority vote takes the place of DDP's communication hook, and this model has one: wrap the model anew, "
            "without register_comm_hook"
        ) from error


def _watch_wrappers(model: nn.Module, why: str) -> list[RemovableHandle]:
    """Refuse other wrappers; return the hooks, to which those of wrappers yet to come are added."""
    parameters, own = {id(p) for p in model.parameters()}, weakref.ref(model)
    handles = list[RemovableHandle]()

    def refuse(other: nn.Module, _: Any) -> None:
        if torch.is_grad_enabled() and other not in _GUARDS and own() is not None:
            raise RuntimeError(why)

    def watch(module: nn.Module, _: str, wrapped: nn.Module | None) -> None:
        if not isinstance(module, DistributedDataParallel) or module is own() or wrapped is None:
            return
        if any(id(p) in parameters for p in wrapped.parameters()):
            handles.append(module.register_forward_pre_hook(refuse))

    handles.append(register_module_module_registration_hook(watch))
    kinds = list(_with_subclasses(DistributedDataParallel))
    for found in gc.get_referrers(*kinds):  # an instance refers to its class; a look at every object would take longer
        if any(type(found) is kind for kind in kinds):
            watch(found, "module", found.module)
    return handles


def _with_subclasses(kind: type) -> Iterator[type]:
    """Yield a class and all that derive from it."""
    yield kind
    derived: type
    for derived in kind.__subclasses__():
        yield from _with_subclasses(derived)


def remove_hooks(handles: Iterable[RemovableHandle]) -> None:
    """Remove hooks by their handles."""
    for handle in handles:
        handle.remove()


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
        queue_callback(lambda: queue_callback(take_back))
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future


class _Guard:
    """Refuses a step on the parameters of a model that votes, unless it is a vote."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._parameters = {id(p): weakref.ref(p) for p in model.parameters()}

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        model = self._model()
        if model is None or not self._holds(p for group in optimizer.param_groups for p in group["params"]):
            return
        held = (optimizer, *vars(optimizer).values())  # Lookahead and its like hold the one that votes
        if all(getattr(one, "vote", None) is None for one in held):
            raise RuntimeError(
                f"{type(optimizer).__name__} steps on parameters of a model that votes, and has no vote: their "
                "gradients are each rank's own, and the ranks would drift apart. Pass a Signum of these parameters to "
                "enable_majority_vote together with the model"
            )
        if isinstance(model, DistributedDataParallel) and is_in_join(model):
            raise RuntimeError(
                "DDP.join() cannot be used with a majority vote: a rank that is through would not answer the votes of "
                "the others. Give every rank the same number of batches (DistributedSampler, drop_last=True), or call "
                "join(throw_on_early_termination=True), which ends all ranks when the first is through"
            )

    def _holds(self, parameters: Iterable[Tensor]) -> bool:
        # A parameter that fully_shard replaced is gone, and its id may be another tensor's.
        known = ((self._parameters.get(id(p)), p) for p in parameters)
        return any(ref is not None and ref() is p for ref, p in known)
