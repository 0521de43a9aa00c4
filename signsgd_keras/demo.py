"""What the demo trains, and what it notes on the way."""

import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from signsgd_core import demo
from signsgd_core.adversaries import Adversary
from signsgd_core.network import traffic

from .replicas import Replicas
from .vote.adversaries import lie
from .vote.verification import digests

BATCH_SIZE = 32
EVALUATIONS = 8


def network(shape: tuple[int, ...], classes: int) -> Any:
    """Return a perceptron for the digits, and a small ResNet of over a million parameters for larger images.

    Args:
        shape: (channels, height, width) of the images, which the model takes with the channels last, uint8.
        classes: how many logits.
    """
    channels, height, width = shape
    images = keras.Input((height, width, channels), dtype="uint8")
    x = layers.Rescaling(1 / 127.5, -1)(images)
    if height * width <= 256:
        x = layers.Flatten()(x)
        for units in (512, 256):
            x = layers.Dense(units, activation="relu")(x)
    else:
        x = layers.Conv2D(32, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.GroupNormalization(8)(x))
        for filters in (64, 128, 256):
            x = _residual(x, filters)
        x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(classes, name="logits")(x))


def _residual(x: Any, filters: int) -> Any:
    """Two 3×3 convolutions beside a shortcut; group norm, so that there are no statistics to keep in step."""
    y = layers.Conv2D(filters, 3, 2, padding="same", use_bias=False)(x)
    y = layers.ReLU()(layers.GroupNormalization(8)(y))
    y = layers.GroupNormalization(8)(layers.Conv2D(filters, 3, padding="same", use_bias=False)(y))
    return layers.ReLU()(layers.Add()([y, layers.Conv2D(filters, 1, 2, use_bias=False)(x)]))


def batches(data: demo.Data, workers: int, seed: int) -> Any:
    """Return the training images shuffled, without end, in batches for all workers: the same for every method."""
    images = np.ascontiguousarray(data.train_images.transpose(0, 2, 3, 1))
    order = tf.data.Dataset.range(len(images)).shuffle(len(images), seed=seed).repeat()
    order = order.batch(workers * BATCH_SIZE, drop_remainder=True)
    options = tf.data.Options()  # every process shuffles alike and takes its own rows
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    pixels, labels = tf.constant(images), tf.constant(data.train_labels)
    return order.map(lambda rows: (tf.gather(pixels, rows), tf.gather(labels, rows))).with_options(options)


class Adam(keras.optimizers.Adam):  # type: ignore[misc]
    """Adam, where replicas may hand other gradients to the mean than they computed; a silent one's are zeros.

    Args:
        learning_rate: a number or a schedule.
        adversaries: replica -> what it makes of its gradients.
    """

    def __init__(self, learning_rate: Any, adversaries: Mapping[int, Adversary]) -> None:
        super().__init__(learning_rate)
        self._adversary = adversaries.get

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Take one step with the mean of what all replicas hand on."""
        adversary = self._adversary(Replicas(tf.distribute.get_strategy()).current()[0])
        super().apply(grads if adversary is None else lie(adversary, grads), trainable_variables)


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Counts bytes and seconds of the training steps, and accuracy on the way.

    Args:
        judge: a copy of the model outside of the strategy; every worker tests it by itself and sends nothing.
        data: with the test images.
        bytes_per_step: what a worker would send, or None to count what this one sends.
    """

    def __init__(self, judge: Any, data: demo.Data, bytes_per_step: int | None) -> None:
        super().__init__()
        self.judge, self.bytes_per_step = judge, bytes_per_step
        self.images, self.labels = data.test_images.transpose(0, 2, 3, 1), data.test_labels
        self.curve: list[tuple[float, float]] = []
        self.seconds: list[float] = []
        self.sent = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Take the sockets' counters."""
        self.before = traffic.socket_bytes()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stop the clock; at times, note the accuracy and what it took."""
        self.seconds.append(time.perf_counter() - self.begin)
        taken, steps = len(self.seconds), self.params["steps"]
        if self.bytes_per_step is None:
            self.sent = traffic.sent_since(self.before)
        else:
            self.sent = taken * self.bytes_per_step
        if taken % max(steps // EVALUATIONS, 1) == 0 or taken == steps:
            self.curve.append((self.sent, self._accuracy()))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Let the progress bar end with the accuracy."""
        logs["test_accuracy"] = self.curve[-1][1]

    def result(self, method: str) -> demo.Result:
        """Return what all workers saw; all of them must call it."""
        replicas = Replicas(self.model.distribute_strategy)
        local = digests(replicas, self.model.trainable_variables).view(np.int64)
        everyone = replicas.gather([np.array([self.sent, *digest]) for digest in local])
        sent = float(everyone[:, 0].mean()) / len(self.seconds)
        identical = len(np.unique(everyone[:, 1:], axis=0)) == 1
        return demo.Result(method, self.curve[-1][1], sent or None, median(self.seconds), identical, self.curve)

    def _accuracy(self) -> float:
        self.judge.set_weights(self.model.get_weights())
        right = 0
        for first in range(0, len(self.labels), 256):
            logits = ops.convert_to_numpy(self.judge(self.images[first : first + 256], training=False))
            right += int((logits.argmax(1) == self.labels[first : first + 256]).sum())
        return right / len(self.labels)


def train(
    method: str,
    optimizer: Callable[[int], Any],
    formula: Callable[[int], int] | None,
    strategy: Any,
    data: demo.Data,
    options: Any,
) -> demo.Result:
    """Train one method by `fit` and return what it came to.

    Args:
        method: its name.
        optimizer: number of steps -> the optimizer with its schedule.
        formula: number of parameters -> bytes that a worker would send in a step; None to count them.
        strategy: of `tf.distribute`.
        data: to train on and test with.
        options: of the command line.
    """
    shape, classes = data.train_images.shape[1:], int(data.train_labels.max()) + 1
    judge, workers = network(shape, classes), strategy.num_replicas_in_sync
    keras.utils.set_random_seed(options.seed)
    with strategy.scope():
        model = network(shape, classes)
        model.compile(optimizer(options.steps), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    recorder = Recorder(judge, data, formula and formula(model.count_params()))
    if is_first(strategy):
        print(f"\n{method}: {model.count_params():,} parameters, {workers} workers, {options.steps} steps", flush=True)
    model.fit(
        batches(data, workers, options.seed),
        steps_per_epoch=options.steps,
        shuffle=False,  # done already
        callbacks=[recorder],
        verbose=(1 if sys.stdout.isatty() else 2) if is_first(strategy) else 0,  # a bar, or a line, or nothing
    )
    return recorder.result(method)


def is_first(strategy: Any) -> bool:
    """Tell whether this process is the one that prints."""
    return strategy.cluster_resolver is None or strategy.cluster_resolver.task_id in (None, 0)
