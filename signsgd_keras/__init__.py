"""signSGD with majority vote for Keras: an optimizer on every backend, the vote under `tf.distribute`."""

import os
import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv:  # the demo, which would come too late: Python asks us first
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

from .geometry import GeometryMonitor
from .loss_scale import LossScaleOptimizer
from .optimizer import Signum

if TYPE_CHECKING:
    from .callbacks import VoteMonitor
    from .cross_device_ops import MajorityVote
    from .strategy import MultiWorkerMajorityVoteStrategy
    from .verify import ReplicasDifferError, VerifyReplicas

__all__ = [
    "GeometryMonitor",
    "LossScaleOptimizer",
    "MajorityVote",
    "MultiWorkerMajorityVoteStrategy",
    "ReplicasDifferError",
    "Signum",
    "VerifyReplicas",
    "VoteMonitor",
]

_HOMES = {
    "MajorityVote": "cross_device_ops",
    "MultiWorkerMajorityVoteStrategy": "strategy",
    "ReplicasDifferError": "verify",
    "VerifyReplicas": "verify",
    "VoteMonitor": "callbacks",
}
"""What needs TensorFlow, and is therefore imported when first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ImportError(
            f"{name} works under tf.distribute and needs Keras' TensorFlow backend, got {backend!r}: set "
            "KERAS_BACKEND=tensorflow before keras is imported"
        )
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
