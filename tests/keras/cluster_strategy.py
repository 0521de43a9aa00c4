"""The strategy of a worker process: TensorFlow wants one for its whole life."""

from functools import cache
from typing import Any


@cache
def strategy() -> Any:
    from signsgd_keras import MultiWorkerMajorityVoteStrategy

    return MultiWorkerMajorityVoteStrategy()
