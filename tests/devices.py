"""Eight logical CPUs for TensorFlow in this process; to be imported before TensorFlow first runs anything."""

import gc
import os
from functools import cache
from typing import Any

import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

DEVICES = 8


@given(st.none())
def _collect_now(nothing: None) -> None:
    """The first test of Hypothesis collects garbage, which takes a minute where a suite's has piled up."""


# Destroying a dataset's iterator waits for its threads with Python's lock held. Where the collector did so in the midst
# of tracing a step, tests stood still for up to minutes.
gc.disable()
_collect_now()

if "TF_CONFIG" not in os.environ:  # a worker of a cluster has one device, and may have run something by now
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * DEVICES
    )


@cache
def mirrored(replicas: int) -> Any:
    """A `MirroredStrategy` that votes, over so many logical CPUs."""
    from signsgd_keras import MajorityVote

    devices = [f"CPU:{k}" for k in range(replicas)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=MajorityVote())
