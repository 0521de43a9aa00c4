"""A model's floating-point buffers: averaged over the ranks when a round closes, if one of them changed."""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..vote.agreement import describe
from ..vote.transport import Message, PointToPoint


class Buffers:
    """The floating-point buffers of a model, and their values after the last round.

    Args:
        model: that has them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._old = {name: buffer.clone() for name, buffer in self._now().items()}

    def take(self, means: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Give buffers their means, and remember all as they are now."""
        for buffer, mean in means:
            buffer.copy_(mean)
        self._old = {name: buffer.clone() for name, buffer in self._now().items()}

    def before(self) -> dict[str, Tensor]:
        """Return them by name, as they were after the last round."""
        return dict(self._old)

    def restore(self) -> None:
        """Give them the values that they had after the last round, but for those that have another shape now."""
        for name, buffer in self._now().items():
            if name in self._old and buffer.shape == self._old[name].shape:
                buffer.copy_(self._old[name])

    def changed(self) -> list[bool]:
        """Tell which ones are no longer as they were, and finite."""
        return [
            (name not in self._old or not torch.equal(buffer, self._old[name])) and bool(buffer.isfinite().all())
            for name, buffer in self._now().items()
        ]

    def mean(self, changed: npt.NDArray[np.bool_], everyone: PointToPoint) -> list[tuple[Tensor, Tensor]]:
        """Return those that a rank changed, each with the mean of those ranks', summed in the same order on all.

        Args:
            changed: on which rank which is, shape (ranks, buffers).
            everyone: the ranks.

        Raises:
            PeerLostError: if a rank does not answer.
        """
        pairs = zip(self._now().values(), changed.T, strict=True)
        chosen = [(buffer, np.flatnonzero(ranks).tolist()) for buffer, ranks in pairs if ranks.any()]
        if not chosen:
            return []
        wide = reduce(torch.promote_types, [buffer.dtype for buffer, _ in chosen], torch.float32)
        row = torch.cat([buffer.reshape(-1).to(wide) for buffer, _ in chosen])
        rows = everyone.gather(row.to(everyone.wire(row.device)), Message.BUFFERS).to(row.device)
        parts = torch.split(rows, [buffer.numel() for buffer, _ in chosen], dim=1)
        return [
            (buffer, (reduce(torch.add, [part[rank] for rank in ranks]) / len(ranks)).view(buffer.shape))
            for (buffer, ranks), part in zip(chosen, parts, strict=True)
        ]

    def in_words(self) -> list[str]:
        """Return what all ranks must have in common, of all buffers: those of whole numbers start from rank 0's."""
        return [describe(f"buffer {name}", buffer) for name, buffer in self._model.named_buffers()]

    def _now(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._model.named_buffers() if buffer.is_floating_point()}
