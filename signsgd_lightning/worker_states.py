"""Every worker's state of an optimizer as one object with a `state_dict`, for libraries that save such objects."""

from typing import Any

from torch.optim import Optimizer

from .checkpoint.gathered import gather_state, scatter_state
from .local_steps.rounds import find_local_steps
from .optimizer import Signum, find_signum, see_through


class WorkerStates:
    """Has the states of all workers, gathered when it is saved and handed out when it is loaded.

    Hugging Face's Accelerate saves rank 0's optimizer alone, but also what is registered with it, after the vote is
    enabled; both are asked for on every rank, and the latter is loaded last.

    Args:
        optimizer: a `Signum`, wrapped or not, or one that takes local steps.

    Raises:
        TypeError: for any other optimizer.

    Example:
        >>> model, optimizer = accelerator.prepare(model, optimizer)  # doctest: +SKIP
        >>> enable_majority_vote(model, optimizer)  # doctest: +SKIP
        >>> accelerator.register_for_checkpointing(WorkerStates(optimizer))  # doctest: +SKIP
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = see_through(optimizer)
        if find_local_steps(self._optimizer) is None:
            if not isinstance(self._optimizer, Signum):
                raise TypeError(
                    f"WorkerStates takes a Signum or what takes local steps, got {type(self._optimizer).__name__}: "
                    "call enable_local_steps(model, optimizer) before WorkerStates(optimizer), or train with Signum"
                )
            find_signum(self._optimizer).restored_apart = True

    def state_dict(self) -> dict[str, Any]:
        """Return what `gather_state` does; every rank must call it."""
        return gather_state(self._optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give every rank its own state back; see `scatter_state`."""
        scatter_state(self._optimizer, state)
