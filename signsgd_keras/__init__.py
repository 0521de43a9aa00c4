"""signSGD with majority vote for Keras: an optimizer on every backend, the vote under `tf.distribute`."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv:  # the demo, which would come too late: Python asks us first
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from . import backend
from .loss_scale import LossScaleOptimizer
from .monitor.geometry_monitor import GeometryMonitor
from .optimizer import Signum

if TYPE_CHECKING:
    from .local_steps.local_vote import LocalVote
    from .monitor.verify_replicas import VerifyReplicas
    from .monitor.vote_monitor import VoteMonitor
    from .strategy import MultiWorkerMajorityVoteStrategy
    from .vote import MajorityVote, ReplicasDifferError

__all__ = ["GeometryMonitor", "LossScaleOptimizer", "Signum"]
if backend.current().can_vote:  # elsewhere `import *` would raise for them
    __all__ += [
        "LocalVote",
        "MajorityVote",
        "MultiWorkerMajorityVoteStrategy",
        "ReplicasDifferError",
        "VerifyReplicas",
        "VoteMonitor",
    ]

_MODULES = {
    "LocalVote": "local_steps.local_vote",
    "MajorityVote": "vote",
    "MultiWorkerMajorityVoteStrategy": "strategy",
    "ReplicasDifferError": "vote",
    "VerifyReplicas": "monitor.verify_replicas",
    "VoteMonitor": "monitor.vote_monitor",
}
"""Name -> its module, for names that need TensorFlow: they are imported when first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = backend.current()
    if not found.can_vote:
        raise ImportError(
            f"{name} votes by tf.distribute and needs Keras' TensorFlow backend, got {found.name!r}: set "
            "KERAS_BACKEND=tensorflow before keras is imported"
        )
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
