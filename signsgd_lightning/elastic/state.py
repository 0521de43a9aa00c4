"""What a newcomer takes over from a worker that is there: all that is the same on all, and nothing that is private."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from signsgd_core.wire import disagreement

from ..optimizer import Signum
from ..state import ENTRIES
from ..vote.agreement import describe


class Stateful(Protocol):
    """A scheduler, a loss scale, a count: whatever has a state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from it."""


class SharedState:
    """The state that is the same on all workers: parameters, buffers, verdict momenta, settings, counters.

    Args:
        model: has the parameters and buffers.
        optimizer: of its parameters.
        others: what else is to be taken over, by name.
    """

    def __init__(self, model: nn.Module, optimizer: Signum, others: Mapping[str, Stateful]) -> None:
        self._model, self._optimizer, self._others = model, optimizer, dict(others)
        self._words = self._in_words()

    def save(self) -> dict[str, Any]:
        """Return the state; parameters and momenta as they are, so that they must not change before it was sent."""
        buffers = {name for name, _ in self._model.named_buffers()}
        model = self._model.state_dict()
        return {
            "words": self._words,
            "model": {name: value.clone() if name in buffers else value for name, value in model.items()},
            "momenta": [
                {e.name: entries[e.name] for e in ENTRIES if not e.private and e.name in entries}
                for entries in (self._optimizer.state.get(p, {}) for p in self._parameters())
            ],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups],
            "others": {name: other.state_dict() for name, other in self._others.items()},
        }

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
        self._model.load_state_dict(state["model"])
        for p, entries in zip(self._parameters(), state["momenta"], strict=True):
            self._optimizer.state[p].update({name: value.to(p.device, copy=True) for name, value in entries.items()})
        for group, settings in zip(self._optimizer.param_groups, state["groups"], strict=True):
            group.update(settings)
        for name, other in self._others.items():
            other.load_state_dict(state["others"][name])

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _in_words(self) -> list[str]:
        """Return what must be the same before a worker may join; a schedule may have moved `lr` since."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        lines = [describe(names[id(p)], p) for p in self._parameters()]
        lines += [describe(f"{name}, in the model", value) for name, value in self._model.state_dict().items()]
        settings = [line for line in self._optimizer.settings_in_words() if ": lr=" not in line]
        settings = [line for line in settings if ": step=" not in line]
        return [*lines, *settings, *(f"state {name!r}" for name in self._others)]
