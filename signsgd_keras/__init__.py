"""signSGD with majority vote for Keras: an optimizer on every backend, the vote under `tf.distribute`."""

from typing import TYPE_CHECKING, Any

import keras

from .optimizer import Signum

if TYPE_CHECKING:
    from .callbacks import VoteMonitor
    from .cross_device_ops import MajorityVote
    from .strategy import MultiWorkerMajorityVoteStrategy

__all__ = ["MajorityVote", "MultiWorkerMajorityVoteStrategy", "Signum", "VoteMonitor"]

_HOMES = {"MajorityVote": "cross_device_ops", "MultiWorkerMajorityVoteStrategy": "strategy", "VoteMonitor": "callbacks"}
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
