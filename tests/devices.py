"""Eight logical CPUs for TensorFlow in this process; to be imported before TensorFlow first runs anything."""

from functools import cache
from typing import Any

import tensorflow as tf

DEVICES = 8

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * DEVICES
)


@cache
def mirrored(replicas: int) -> Any:
    """A `MirroredStrategy` that votes, over so many logical CPUs."""
    from signsgd_keras import MajorityVote

    devices = [f"CPU:{k}" for k in range(replicas)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=MajorityVote())
