"""What tests of adversaries share: a few steps on given gradients, by Keras and by `Reference`."""

from typing import Any

import keras
import numpy as np

from signsgd_core import Reference, Zeros
from signsgd_core.adversaries import ADVERSARIES, Adversary
from signsgd_keras import Signum
from tests.keras.models import Array, arrays

LR, SHAPES, STEPS = 0.25, ((37,), (3, 5)), 6

CASES = [{1: "invert"}, {0: "random", 2: "constant"}, {1: "nan"}, {0: "collude", 1: "collude"}, {0: "zeros"}]
"""Of four workers or of three."""


def given(workers: int) -> list[list[list[Array]]]:
    """Gradients in eighths: [step][worker][tensor]."""
    random = np.random.default_rng(0)
    steps = random.integers(-3, 4, (STEPS, workers, 37 + 15)) / 8
    return [[_split(worker.astype(np.float32)) for worker in step] for step in steps]


def adversaries(names: dict[int, str]) -> dict[int, Adversary]:
    """Fresh ones, by their names; "zeros" is what `silent` comes to in Keras."""
    known: dict[str, Any] = {**ADVERSARIES, "zeros": lambda seed: np.zeros_like}
    return {worker: known[name](worker) for worker, name in names.items()}


class Moody:
    """Sends its honest gradient, or nothing, in turn; in place of nothing a test may want zeros."""

    def __init__(self, nothing: Any = lambda gradient: None) -> None:
        self.nothing, self.calls = nothing, 0

    def __call__(self, gradient: Array) -> Array | None:
        self.calls += 1
        return gradient if self.calls % 2 else self.nothing(gradient)


def reference(gradients: list[list[list[Array]]], lying: dict[int, Adversary], zeros: Zeros) -> list[Array]:
    """The parameters at the end."""
    start = [np.ones(shape, np.float32) for shape in SHAPES]
    judge = Reference(start, len(gradients[0]), LR, (0.5, 0.5), zeros=zeros, adversaries=lying)
    for step in gradients:
        judge.step(step)
    return judge.parameters


def train(strategy: Any, gradients: list[list[list[Array]]], zeros: Zeros, **settings: Any) -> list[Array]:
    """The parameters at the end, which are the same on all replicas of this process."""
    import tensorflow as tf

    with strategy.scope():
        xs = [keras.Variable(np.ones(shape, np.float32), name=f"x{k}") for k, shape in enumerate(SHAPES)]
        optimizer = Signum(LR, 0.5, 0.5, zeros=zeros, **settings)
        optimizer.build(xs)

    @tf.function  # type: ignore[untyped-decorator]
    def step(rows: Any) -> None:
        def own() -> None:
            replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
            optimizer.apply([row[replica] for row in rows], xs)

        strategy.run(own)

    for workers in gradients:
        step([tf.constant(np.stack(tensors)) for tensors in zip(*workers, strict=True)])
    return arrays(xs)


def _split(worker: Array) -> list[Array]:
    return [worker[:37], worker[37:].reshape(3, 5)]
