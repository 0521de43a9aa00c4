"""`x_0`: where a round began, for every parameter, whatever the parameter's memory holds meanwhile."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Anchors(dict[Tensor, Tensor]):
    """The parameters of some optimizers, each with its `x_0`: row-major, at least float32.

    Args:
        model: names the parameters.
        optimizers: that have them.

    Attributes:
        names: of the parameters, by the id of an `x_0`.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        super().__init__()
        self.names = dict[int, str]()
        self._model, self._optimizers = model, optimizers

    def find(self) -> list[Tensor]:
        """Give every parameter an `x_0`, also those of groups that were added since; return the new ones.

        All are in the order of the groups then, whenever a group was added: a state is loaded by that order.
        """
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        found = dict.fromkeys(p for group in groups for p in group["params"])
        new = [p for p in found if p not in self]
        names = {id(p): name for name, p in self._model.named_parameters()} if new else {}
        for p in new:
            wide = torch.promote_types(p.dtype, torch.float32)  # half types round once, at the end
            self[p] = p.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
            self.names[id(self[p])] = names.get(id(p), "a parameter")
        if new:
            ordered = {p: self[p] for p in [*found, *self]}
            self.clear()
            self.update(ordered)
        return [self[p] for p in new]

    def has_all_of(self, optimizer: Optimizer) -> bool:
        """Tell whether all parameters of one optimizer have an `x_0`."""
        return all(p in self for group in optimizer.param_groups for p in group["params"])

    def take_down(self) -> bool:
        """Make every `x_0` what its parameter is; return whether one was elsewhere than the last round left it."""
        moved = False
        for p, x in self.items():
            if not torch.equal(p.to(x.dtype), x):  # by value: what is written through `p.data` has another version
                x.copy_(p)
                moved = True
        return moved

    def put_back(self) -> None:
        """Let every parameter go to its `x_0`, which is rounded as the parameter is."""
        for p, x in self.items():
            p.copy_(x)
            if p.dtype is not x.dtype:
                x.copy_(p)

    def model_state(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's state as it was when the round began.

        Args:
            buffers: name -> those of which the values then are not the ones now.
        """
        state = self._model.state_dict(keep_vars=True)
        now = {name: self[value].to(value.dtype) if value in self else value.detach() for name, value in state.items()}
        return {**now, **{name: value for name, value in buffers.items() if name in now}}
