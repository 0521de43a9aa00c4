"""Keras' backends: one class for each, with what it does its own way; no other module asks which one is in use."""

from functools import cache
from importlib import import_module

import keras

from .base import Backend, GradientRows, OneWorker

__all__ = ["Backend", "GradientRows", "OneWorker", "current"]

_CLASSES = {"tensorflow": "TensorFlow", "jax": "Jax", "torch": "Torch"}


@cache
def current() -> Backend:
    """Return the backend that Keras was started with; Keras has one for the life of a process."""
    name = keras.backend.backend()
    if name not in _CLASSES:
        return Backend(name)
    backend: Backend = getattr(import_module(f".{name}", __name__), _CLASSES[name])(name)
    return backend
