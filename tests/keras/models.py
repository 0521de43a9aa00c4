"""Small dyadic models and data, and the judge: each replica's own gradients, taken apart, replayed in `Reference`."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from signsgd_core import Reference

Array = npt.NDArray[Any]
Batch = tuple[Array, Array]
"""Features, float32 of shape (rows, 4), and targets, float32 of shape (rows, 1)."""


@cache
def plain() -> Any:
    """A `MirroredStrategy` with TensorFlow's own op, over two devices.

    One for the whole process: the collectives of several have the same keys and fail where sizes or shapes differ.
    """
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def data(rows: int, seed: int = 0) -> Batch:
    """Features in halves and targets in quarters."""
    random = np.random.default_rng(seed)
    x = random.integers(-2, 3, (rows, 4)) / 2
    y = random.integers(-8, 9, (rows, 1)) / 4
    return x.astype(np.float32), y.astype(np.float32)


def weights(shape: Sequence[int], seed: int) -> Array:
    """Numbers in eighths, none of them 0."""
    random = np.random.default_rng(seed)
    return (random.choice([-1, 1], shape) * random.integers(1, 9, shape) / 8).astype(np.float32)


def net(*extra: Any) -> Any:
    """Two layers, 19 parameters, always the same ones; `extra` layers go between.

    Its names do not count up, so that workers which built other models before still agree.
    """
    import keras

    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, activation="relu", name="one"),
            *extra,
            keras.layers.Dense(1, name="two"),
        ],
        name="net",
    )
    for k, variable in enumerate(model.trainable_variables):
        variable.assign(weights(variable.shape, seed=k))
    return model


def compiled(optimizer: Any, make: Callable[[], Any] = net, **settings: Any) -> Any:
    """A model with an optimizer, to be called in the scope of a strategy."""
    model = make()
    model.compile(optimizer=optimizer, loss="mse", **settings)
    return model


def components(variables: Iterable[Any]) -> list[Array]:
    """What every replica holds of each variable, as rows; one row where it is no variable of several."""
    values = (getattr(variable, "value", variable) for variable in variables)
    return [np.stack([v.numpy() for v in getattr(value, "values", [value])]) for value in values]


def arrays(variables: Iterable[Any]) -> list[Array]:
    """What variables hold, which must be the same bits on all replicas."""
    found = components(variables)
    assert all(len({row.tobytes() for row in rows}) == 1 for rows in found), "replicas differ"
    return [rows[0] for rows in found]


def digest(variables: Iterable[Any]) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays(variables))).hexdigest()


def same(ours: Iterable[Array], theirs: Iterable[Array]) -> bool:
    """Whether two lists of arrays are the same, bit for bit."""
    return [(a.shape, a.dtype, a.tobytes()) for a in ours] == [(b.shape, b.dtype, b.tobytes()) for b in theirs]


def dataset(x: Array, y: Array, batch_size: int) -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)


def shares(strategy: Any, batches: Any) -> list[list[Batch]]:
    """Which rows each local replica gets of each batch of a dataset: ``shares[step][replica]``."""
    return [
        list(zip(*([v.numpy() for v in strategy.experimental_local_results(part)] for part in batch), strict=True))
        for batch in strategy.experimental_distribute_dataset(batches)
    ]


def gradients(model: Any, share: Batch, replicas: int) -> list[Array | None]:
    """One replica's own gradients of its share of a batch: Keras divides the loss by the number of replicas."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(share[0], training=True) - share[1])) / replicas
    found = tape.gradient(loss, [v.value for v in model.trainable_variables])
    return [None if g is None else tf.convert_to_tensor(g).numpy() for g in found]


def replay(
    steps: Sequence[Sequence[Batch]],
    lr: float,
    make: Callable[[], Any] = net,
    after: Reference | None = None,
    without: str | None = None,
    every: int = 1,
    clip: Callable[[list[Array]], list[Any]] | None = None,
    **settings: Any,
) -> Reference:
    """Train the same model in `Reference`.

    Args:
        steps: ``steps[t][i]``, replica `i`'s share of batch `t`.
        lr: the learning rate.
        make: builds the model.
        after: goes on where this one ended.
        without: the layer that has no gradients.
        every: how many batches are accumulated.
        clip: maps a replica's gradients to clipped ones.
        settings: of `Reference`.
    """
    model, replicas = make(), len(steps[0])
    variables = model.trainable_variables
    reference = after or Reference([v.numpy() for v in variables], replicas, lr, **settings)
    reference.lr = lr
    for first in range(0, len(steps) - every + 1, every):
        for variable, x in zip(variables, reference.parameters, strict=True):
            variable.assign(x)
        own: list[list[Array | None]] = []
        for i in range(replicas):
            each = [gradients(model, step[i], replicas) for step in steps[first : first + every]]
            means = [parts[0] if every == 1 else _mean(parts) for parts in zip(*each, strict=True)]
            means = [None if without and without in v.path else g for g, v in zip(means, variables, strict=True)]
            own.append([np.array(g) for g in clip(means)] if clip else means)
        reference.step(own)
    return reference


def _mean(parts: Sequence[Any]) -> Array:
    """In the order in which gradients arrive: the last one is added to the sum of those before."""
    total = parts[0]
    for part in parts[1:]:
        total = part + total
    return np.asarray(total / np.float32(len(parts)))
