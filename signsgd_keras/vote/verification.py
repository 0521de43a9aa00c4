"""Do all replicas hold the same bits? Digests of variables and verdict momenta, compared between all workers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from signsgd_core.wire import DIGEST_BYTES, Digests, digest, find_difference

from ..replicas import Replicas
from ..variables import native, path
from .transport import Transport

Variable = Any


class ReplicasDifferError(RuntimeError):
    """Variables or verdict momenta are not the same on all replicas.

    Attributes:
        replicas: those that differ from the most others.
        step: `t`, after which it was found.
        variable: the path of the first that differs.
    """

    def __init__(
        self,
        replicas: list[int],
        step: int,
        variable: str,
        words: tuple[str, str, str] = ("step", "replica", "verdict momentum"),
    ) -> None:
        one, (each, kind, momentum) = len(replicas) == 1, words
        who = f"{kind} {replicas[0]} differs" if one else f"{kind}s {_enumerate(replicas)} differ"
        super().__init__(
            f"after {each} {step} {who} from the other {kind}s in {variable}, or in its {momentum}: memory failed "
            f"there, or code changed variables on that {kind} alone. Restart all from the last checkpoint."
        )
        self.replicas, self.step, self.variable = replicas, step, variable


def verify(replicas: Replicas, transport: Transport, shared: Sequence[Sequence[Variable]], step: int) -> None:
    """Make sure that all replicas hold the same bits; all workers must call it.

    Args:
        replicas: to compare.
        transport: between them.
        shared: of each model variable itself and its state that is the same on all.
        step: `t`, the number of the step just taken.

    Raises:
        ReplicasDifferError: if not, on all workers.
    """
    local = np.stack([digests(replicas, variables) for variables in shared], axis=1)

    def gather(digests: Digests) -> Digests:
        everyone = transport.gather(np.ascontiguousarray(digests).view(np.int32))
        return everyone.view(np.uint8).reshape(-1, digests.shape[1], DIGEST_BYTES)

    found = find_difference(local, gather, gather)
    if found is not None:
        number, differing = found
        raise ReplicasDifferError(differing, step, path(shared[number][0]))


def digests(replicas: Replicas, variables: Sequence[Variable]) -> Digests:
    """Return one digest of all the variables for each replica of this worker, shape (replicas, DIGEST_BYTES)."""
    held = zip(*(replicas.local(native(variable)) for variable in variables), strict=True)
    return np.stack([np.frombuffer(digest(part.numpy() for part in parts), np.uint8) for parts in held])


def _enumerate(replicas: list[int]) -> str:
    return ", ".join(map(str, replicas[:-1])) + f" and {replicas[-1]}"
