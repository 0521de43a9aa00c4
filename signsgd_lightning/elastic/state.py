"""What a newcomer takes over from a worker that is there: all that is the same on all, and nothing that is private."""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from signsgd_core.wire import disagreement

from ..checkpoint.loading import reason_of, untrusted
from ..local_steps import LocalSteps
from ..optimizer import Signum
from ..state import ENTRIES
from ..vote.agreement import describe

_CHANGING = ("lr", "step")
"""Settings that change during training."""


class Stateful(Protocol):
    """A scheduler, a loss scale, a count: whatever has a state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from it."""


class Shared(Stateful, Protocol):
    """What is trained, as far as it is the same on all workers."""

    def in_words(self) -> list[str]:
        """Return what must be the same before a worker may join."""


class SharedState:
    """The state that is the same on all workers.

    Args:
        trained: model and optimizers.
        others: what else is to be taken over, by name.

    Raises:
        TypeError: if the state of one of these is no tensors and plain values, which alone another worker loads.
    """

    def __init__(self, trained: Shared, others: Mapping[str, Stateful]) -> None:
        self._trained, self._others = trained, dict(others)
        for name, other in self._others.items():
            _check_plain(name, other.state_dict())
        self._words = [*trained.in_words(), *(f"state {name!r}" for name in self._others)]

    def save(self) -> dict[str, Any]:
        """Return the state; parameters and momenta as they are, so that they must not change before it was sent."""
        others = {name: other.state_dict() for name, other in self._others.items()}
        return {"words": self._words, "trained": _plain(self._trained.state_dict()), "others": _plain(others)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what another worker's `save` returned; what is private to this one stays.

        Raises:
            RuntimeError: if the other has another model or other settings; then nothing was loaded.
        """
        if state["words"] != self._words:
            raise RuntimeError(
                f"this worker cannot join, for it has another model or other settings: "
                f"{disagreement([state['words'], self._words], 'worker')}, which is this one. Start it with the "
                "same model, optimizer and state as the others"
            )
        self._trained.load_state_dict(state["trained"])
        for name, other in self._others.items():
            other.load_state_dict(state["others"][name])


class SharedSteps:
    """Parameters, buffers, verdict momenta, settings and counters of a model whose every step is a vote.

    Args:
        model: has the parameters and buffers.
        optimizer: of its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Signum) -> None:
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return them; buffers as they are now."""
        buffers = {name for name, _ in self._model.named_buffers()}
        model = self._model.state_dict()
        return {
            "model": {name: value.clone() if name in buffers else value for name, value in model.items()},
            "momenta": [
                {e.name: entries[e.name] for e in ENTRIES if not e.private and e.name in entries}
                for entries in (self._optimizer.state.get(p, {}) for p in _parameters(self._optimizer))
            ],
            "groups": _settings(self._optimizer),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them."""
        _check_groups([self._optimizer], [state_dict["groups"]])
        self._model.load_state_dict(state_dict["model"])
        for p, entries in zip(_parameters(self._optimizer), state_dict["momenta"], strict=True):
            self._optimizer.state[p].update({name: value.to(p.device, copy=True) for name, value in entries.items()})
        _set(self._optimizer, state_dict["groups"])

    def in_words(self) -> list[str]:
        """Return the model, and settings; a schedule may have moved `lr` since."""
        return [*_in_words(self._model, [self._optimizer]), *self._optimizer.settings_in_words(_CHANGING)]


class SharedRounds:
    """Parameters and floating-point buffers as a round began, outer momenta, settings, counters.

    The inner optimizers' state is each worker's own.

    Args:
        model: has the parameters and buffers.
        local: the rounds.
        drawn: returns how many batches were drawn when the round began.
        go_on: is told that number.
    """

    def __init__(
        self, model: nn.Module, local: LocalSteps, drawn: Callable[[], int], go_on: Callable[[int], None]
    ) -> None:
        self._model, self._local, self._drawn, self._go_on = model, local, drawn, go_on

    def state_dict(self) -> dict[str, Any]:
        """Return them."""
        return {
            "model": self._local.model_state(),
            "outer": self._local.state_dict(),
            "inner": [_settings(optimizer) for optimizer in self._local.optimizers],
            "drawn": self._drawn(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them."""
        _check_groups(self._local.optimizers, state_dict["inner"])
        self._local.start_from(lambda: self._model.load_state_dict(state_dict["model"]))
        self._local.load_state_dict(state_dict["outer"])
        for optimizer, groups in zip(self._local.optimizers, state_dict["inner"], strict=True):
            _set(optimizer, groups)
        self._go_on(state_dict["drawn"])

    def in_words(self) -> list[str]:
        """Return the model, and settings of the rounds."""
        return [*_in_words(self._model, self._local.optimizers), *self._local.settings(_CHANGING)]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _set(optimizer: Optimizer, settings: Sequence[dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _check_groups(optimizers: Sequence[Optimizer], settings: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Make sure that there are as many parameter groups as in another worker's state: one may have added some since.

    Raises:
        RuntimeError: if not.
    """
    own, others = [len(optimizer.param_groups) for optimizer in optimizers], [len(groups) for groups in settings]
    if own != others:
        raise RuntimeError(
            f"this worker cannot join, for the others have {others} parameter groups and it has {own}: add the same "
            "groups before the first step"
        )


def _in_words(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    lines = [describe(names[id(p)], p) for optimizer in optimizers for p in _parameters(optimizer)]
    for name, value in model.state_dict().items():
        what = f"{name}, in the model"
        lines.append(describe(what, value) if isinstance(value, Tensor) else what)  # no tensor: of get_extra_state
    return lines


def _plain(state: Any) -> Any:
    """Return a state with Python's numbers for NumPy's, which are not loaded; tensors are the same."""
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return type(state)(map(_plain, state)) if type(state) in (list, tuple) else state


def _check_plain(name: str, state: dict[str, Any]) -> None:
    """Make sure that another worker would load a state.

    Raises:
        TypeError: if not.
    """
    file = io.BytesIO()
    try:
        torch.save(_plain(state), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        held = untrusted(error) or reason_of(error)
        raise TypeError(
            f"a newcomer takes over tensors and plain values alone, and state {name!r} has something else ({held}): "
            "leave it out of its state_dict()"
        ) from error
