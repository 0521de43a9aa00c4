"""Replicas that lie: an adversary of `signsgd_core` between a replica's gradients and its vote, in the graph."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from signsgd_core.adversaries import Adversary

Tensor = Any


def lie(adversary: Adversary, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return what an adversary sends instead of a replica's gradients.

    Args:
        adversary: called at every step once for each gradient, in their order, with float32 arrays.
        gradients: dense; one that the adversary hands nothing on for becomes zeros.

    Returns:
        float32, of the gradients' shapes.

    Example:
        >>> from signsgd_core.adversaries import invert
        >>> lie(invert, [tf.constant([1.0, -2.0])])[0].numpy()
        array([-1.,  2.], dtype=float32)
    """

    def send(gradient: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        sent = adversary(gradient)
        return np.zeros_like(gradient) if sent is None else np.asarray(sent, np.float32)

    sent = []
    for gradient in gradients:
        lied = tf.numpy_function(send, [tf.cast(gradient, tf.float32)], tf.float32)
        lied.set_shape(gradient.shape)
        sent.append(lied)
    return sent
