"""Which parameters a rank's backward pass really used, where DDP hides it behind gradients of zero."""

from collections.abc import Iterable

from torch import Tensor


class Use:
    """Notes the parameters whose gradients a backward pass computed since the last vote.

    With ``find_unused_parameters`` or ``static_graph``, DDP gives a parameter that this rank did not use, but another
    did, a gradient of zero, which would vote with the momentum instead of abstaining.

    Args:
        parameters: those that DDP looks after; any other has a gradient if and only if it was used.

    Example:
        >>> import torch
        >>> a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> use = Use([a, b])
        >>> (2 * a).backward()
        >>> a in use, b in use
        (True, False)
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._watched, self._used = set[int](), set[int]()
        for p in parameters:
            self._watched.add(id(p))
            p.register_post_accumulate_grad_hook(lambda p: self._used.add(id(p)))  # type: ignore[no-untyped-call]

    def __contains__(self, parameter: Tensor) -> bool:
        """Whether the parameter was used, as far as DDP could hide it."""
        return id(parameter) in self._used or id(parameter) not in self._watched

    def forget(self) -> None:
        """Start over, once the gradients were voted on or thrown away."""
        self._used.clear()
