"""The outer step of local steps (L4), and what it keeps from round to round."""

from collections.abc import Mapping, Sequence
from typing import Any

import signsgd_core as core

from .. import kernels
from ..optimizer import Signum
from ..state import OUTER_MOMENTUM
from ..views import FlatView
from ..vote.topology import Verdict
from .anchors import Anchors
from .options import LocalStepOptions


class OuterStep:
    """Moves every `x_0` by a verdict at a magnitude.

    Args:
        anchors: has every `x_0`.
        options: of the rounds.

    Attributes:
        optimizer: has `x_0` for its parameters, and keeps the outer momenta and the number of rounds.
    """

    def __init__(self, anchors: Anchors, options: LocalStepOptions) -> None:
        self._anchors, self._momentum = anchors, options.outer_momentum
        self.optimizer = Signum([{"params": []}], lr=options.outer_lr, betas=(0.0, 0.0))
        self._group["outer_momentum"] = options.outer_momentum

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return self.optimizer.t

    def count(self) -> None:
        """Count a round."""
        self._group["step"] += 1

    def find_parameters(self) -> bool:
        """Take the parameters of groups that were added since, too; return whether there were any."""
        new = self._anchors.find()
        self._group["params"] = list(self._anchors.values())
        return bool(new)

    def take(self, verdicts: Sequence[Verdict], magnitudes: Sequence[float]) -> None:
        """Take the step; nothing here waits for another rank."""
        magnitude = {id(x): s for x, s in zip(self._anchors.values(), magnitudes, strict=True)}
        for verdict in verdicts:
            device = verdict.views[0].parameter.device
            bits, move = verdict.bits.to(device), kernels.for_device(device).apply
            for view in verdict.views:
                view.magnitude = magnitude[id(view.parameter)]
            if not self._momentum:
                move(verdict.views, 0, verdict.views[-1].stop, bits)  # x_0 - η·s·V
                continue
            steps = [_zeros(view) for view in verdict.views]
            move(steps, 0, steps[-1].stop, bits)  # s·V
            for view, step in zip(verdict.views, steps, strict=True):
                x, u = view.parameter, view.entry(OUTER_MOMENTUM)
                assert u is not None
                new, later = core.outer_update(x, u, step.parameter, view.group["lr"], view.group["outer_momentum"])
                x.copy_(new)
                u.copy_(later)

    def state_dict(self) -> dict[str, Any]:
        """Return outer momenta, in the order of the parameters, and the number of rounds."""
        momenta = [self.optimizer.state.get(x, {}).get(OUTER_MOMENTUM.name) for x in self._anchors.values()]
        return {"rounds": self.rounds, "outer_momenta": momenta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: if it is of another model; then nothing was loaded.
        """
        self.find_parameters()
        anchors, momenta = list(self._anchors.values()), state["outer_momenta"]
        shapes = [None if u is None else tuple(u.shape) for u in momenta]
        if len(shapes) != len(anchors) or any(
            shape not in (None, tuple(x.shape)) for shape, x in zip(shapes, anchors, strict=True)
        ):
            raise ValueError(
                f"the outer momenta must fit {len(anchors)} parameters, got {len(shapes)} of the shapes {shapes}: "
                "build the model that was saved"
            )
        self._group["step"] = state["rounds"]
        for x, u in zip(anchors, momenta, strict=True):
            self.optimizer.state[x] = {} if u is None else {OUTER_MOMENTUM.name: u.to(x.device).clone()}

    @property
    def _group(self) -> dict[str, Any]:
        group: dict[str, Any] = self.optimizer.param_groups[0]
        return group


def _zeros(view: FlatView) -> FlatView:
    """Return zeros from which a verdict takes ``−s·V``, in the memory of a displacement."""
    assert view.sent is not None
    group = {**view.group, "lr": -1.0}
    return FlatView(view.sent.zero_(), group, {}, present=True, start=view.start, magnitude=view.magnitude)
