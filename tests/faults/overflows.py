"""What tests of `LossScaleOptimizer` share: gradients that overflow on chosen replicas and steps, and the judge."""

from typing import Any

import keras
import numpy as np

from signsgd_core import Reference
from signsgd_keras import LossScaleOptimizer, Signum
from tests.keras.models import Array, arrays, components, same

LR, SIZE, STEPS = 2.0**-4, 21, 14
FIRST, GROWTH = 8.0, 3
OVERFLOWS = {(1, 1): np.inf, (2, 0): np.nan, (2, 1): -np.inf, (9, 1): 2.0**125}
"""(step, replica) -> what some of its gradient entries are; the last is finite but for the scale."""


def given(replicas: int) -> Array:
    """Gradients in eighths, shape (steps, replicas, SIZE), with the overflows in them."""
    values = np.random.default_rng(0).integers(-3, 4, (STEPS, replicas, SIZE)) / 8
    for (step, replica), value in OVERFLOWS.items():
        values[step, replica, step::5] = value
    return values.astype(np.float32)


def expected(gradients: Array) -> tuple[list[Array], list[list[tuple[float, int]]], Reference]:
    """The parameters and every replica's scale and counter after each step, and `Reference` at the end."""
    replicas = gradients.shape[1]
    reference = Reference([np.ones(SIZE, np.float32)], replicas, LR, (0.5, 0.5))
    state, parameters, states = [(FIRST, 0)] * replicas, [], []
    for step in gradients:
        with np.errstate(over="ignore"):
            scaled = [g * np.float32(scale) for g, (scale, _) in zip(step, state, strict=True)]
        reference.step([[g / np.float32(scale)] for g, (scale, _) in zip(scaled, state, strict=True)])
        for replica, g in enumerate(scaled):
            scale, counter = state[replica]
            if not np.isfinite(g).all():
                state[replica] = (scale / 2, 0)
            else:
                state[replica] = (scale * 2, 0) if counter == GROWTH - 1 else (scale, counter + 1)
        parameters.append(reference.parameters[0])
        states.append(list(state))
    return parameters, states, reference


Steps = list[tuple[Array, list[tuple[float, int]]]]
"""Of each step the parameters, and the scale and counter of each replica of this process."""


def run(strategy: Any, gradients: Array) -> tuple[Steps, list[Array], int]:
    """Take the steps in a custom loop; also return the momenta of this process, and the number of steps."""
    import tensorflow as tf

    with strategy.scope():
        x = keras.Variable(np.ones(SIZE, np.float32), name="x")
        optimizer = LossScaleOptimizer(Signum(LR, 0.5, 0.5), initial_scale=FIRST, dynamic_growth_steps=GROWTH)
        optimizer.build([x])

    @tf.function  # type: ignore[untyped-decorator]
    def step(rows: Any) -> None:
        def own() -> None:
            replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
            with tf.GradientTape() as tape:
                loss = optimizer.scale_loss(tf.reduce_sum(x * rows[replica]))
            optimizer.apply([tape.gradient(loss, x.value)], [x])

        strategy.run(own)

    steps: Steps = []
    for rows in gradients:
        step(tf.constant(rows))
        scales, counters = components([optimizer.dynamic_scale, optimizer.step_counter])
        steps.append((arrays([x])[0], list(zip(scales.tolist(), counters.tolist(), strict=True))))
    return steps, list(components(optimizer.inner_optimizer._momentums)[0]), int(optimizer.iterations.numpy())


def judge(outcome: tuple[Steps, list[Array], int], gradients: Array, own: slice) -> None:
    parameters, states, reference = expected(gradients)
    steps, momenta, taken = outcome
    assert [found for _, found in steps] == [state[own] for state in states]
    assert same([x for x, _ in steps], parameters)
    assert same(momenta, [m[0] for m in reference.momenta[own]])
    assert taken == reference.t == STEPS
