"""What tests of `VerifyReplicas` share: a fit with a bit flipped on one replica, among replicas or workers."""

from typing import Any

import keras

from signsgd_keras import ReplicasDifferError, Signum, VerifyReplicas
from tests.keras.models import compiled, data

STEPS = 8
Found = tuple[str, tuple[list[int], int, str] | int]
"""The error's words, and what it knows; or nothing, and the steps taken."""


class FlipBit(keras.callbacks.Callback):  # type: ignore[misc]
    """Flip one bit of the second kernel, or of its verdict momentum, on one replica after one step."""

    def __init__(self, replica: int, step: int, momentum: bool = False) -> None:
        super().__init__()
        self.replica, self.step, self.momentum, self.flipped = replica, step, momentum, False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        import tensorflow as tf

        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if int(optimizer.iterations.numpy()) != self.step + 1 or self.flipped:
            return
        self.flipped = True
        strategy, kernel = self.model.distribute_strategy, self.model.get_layer("two").kernel
        variable = optimizer.state_of(kernel)[1] if self.momentum else kernel
        local = strategy.experimental_local_results(variable.value)
        first = getattr(strategy.cluster_resolver, "task_id", 0) * len(local)
        if first <= self.replica < first + len(local):
            component = local[self.replica - first]
            bits = tf.bitcast(component, tf.int32).numpy()
            bits.flat[1] ^= 1 << 20  # high enough to outlive a step's rounding
            component.assign(tf.bitcast(bits, tf.float32))


def train(strategy: Any, every: int, *flips: Any, wrap: Any = lambda optimizer: optimizer, **settings: Any) -> Found:
    with strategy.scope():
        model = compiled(wrap(Signum(2.0**-4, verdict_momentum=0.5, **settings)))
    callbacks = [*flips, VerifyReplicas(every)]
    try:
        model.fit(*data(24), batch_size=6, epochs=2, shuffle=False, callbacks=callbacks, verbose=0)
    except ReplicasDifferError as error:
        return str(error), (error.replicas, error.step, error.variable)
    return "", int(model.optimizer.iterations.numpy())
