"""The Keras side: `Signum` alone on each backend, and voting under a `tf.distribute` strategy.

Frameworks are imported where they are used: a process has one backend of Keras and not always another.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from .cases import LR, Array, Case, Trajectory

Step = Callable[[list[Any]], object]
"""Takes a gradient or None for each variable."""


def make(case: Case, without: Collection[int] = ()) -> tuple[list[Any], Any]:
    """Return the variables of the case's tensors, but for some, and their optimizer, built."""
    import keras

    from signsgd_keras import Signum

    xs = [keras.Variable(rows_last(x), name=f"x{k}") for k, x in enumerate(case.parameters()) if k not in without]
    beta_1, beta_2 = case.betas
    optimizer = Signum(
        learning_rate=LR,
        beta_1=beta_1,
        beta_2=beta_2,
        verdict_momentum=case.verdict_momentum,
        zeros=case.zeros,
        warmup_steps=case.warmup_steps,
        weight_decay=case.weight_decay or None,
        orthogonalize=case.orthogonalize,
        other_lr_ratio=1.0 if case.orthogonalize else None,
    )
    optimizer.build(xs)
    return xs, optimizer


def rows_last(x: Array) -> Array:
    """Return a tensor of a case, whose first dimension has a matrix's rows, in the layout of Keras."""
    return np.moveaxis(x, 0, -1) if x.ndim > 1 else x


def rows_first(x: Any) -> Array:
    """Return a value of Keras as it is in a case."""
    value = np.array(x)
    return np.ascontiguousarray(np.moveaxis(value, -1, 0)) if value.ndim > 1 else value


def alone(cases: Sequence[Case], compiled: bool = False) -> list[Trajectory]:
    """`Signum` with one replica, as this process' backend runs it; compiled by XLA on TensorFlow where asked for."""
    import keras
    from keras import ops

    trajectories = []
    for case in cases:
        xs, optimizer = make(case)
        step = {"tensorflow": _graph, "jax": _stateless, "torch": _eager}[keras.backend.backend()](
            xs, optimizer, compiled
        )
        trajectory = []
        for ((*gradients,),) in case.gradients():
            step([None if g is None else ops.convert_to_tensor(rows_last(g)) for g in gradients])
            trajectory.append([rows_first(ops.convert_to_numpy(x)) for x in xs])
        trajectories.append(trajectory)
    return trajectories


def _graph(xs: list[Any], optimizer: Any, compiled: bool) -> Step:
    import tensorflow as tf

    step: Step = tf.function(lambda gradients: optimizer.apply(gradients, xs), jit_compile=compiled, autograph=False)
    return step


def _stateless(xs: list[Any], optimizer: Any, compiled: bool) -> Step:
    """`stateless_apply` as `jax.jit` compiles it; it takes no absent gradients, `apply` does."""
    import jax

    pure = jax.jit(optimizer.stateless_apply)

    def step(gradients: list[Any]) -> None:
        if any(g is None for g in gradients):
            optimizer.apply(gradients, xs)
            return
        values = pure([v.value for v in optimizer.variables], gradients, [x.value for x in xs])
        for variables, new in zip((xs, optimizer.variables), values, strict=True):
            for variable, value in zip(variables, new, strict=True):
                variable.assign(value)

    return step


def _eager(xs: list[Any], optimizer: Any, compiled: bool) -> Step:
    return lambda gradients: optimizer.apply(gradients, xs)


def multi_worker(cases: Sequence[Case], without: Collection[int]) -> list[Trajectory]:
    """On one worker of a cluster, with one replica."""
    from tests.keras.cluster_strategy import strategy

    (trajectories,) = under(strategy(), cases, without=without)
    return trajectories


def under(
    strategy: Any, cases: Sequence[Case], graph: bool = True, without: Collection[int] = ()
) -> list[list[Trajectory]]:
    """Train under a `tf.distribute` strategy, in a graph or operation by operation; [replica of this process][case]."""
    by_case = [_under(strategy, case, graph, without) for case in cases]
    return [list(trajectories) for trajectories in zip(*by_case, strict=True)]


def _under(strategy: Any, case: Case, graph: bool, without: Collection[int]) -> list[Trajectory]:
    import tensorflow as tf

    def split(rows: Sequence[Array | None]) -> Any:
        if rows[0] is None:
            return None  # on all workers, or a vote would not be possible
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(rows_last(rows[context.replica_id_in_sync_group]))
        )

    with strategy.scope():
        xs, optimizer = make(case, without)

    def replica(gradients: list[Any]) -> None:
        # computed here, as gradients are: Keras on one replica cannot take a graph's argument, which has no device
        optimizer.apply([None if g is None else tf.identity(g) for g in gradients], xs)

    def step(gradients: list[Any]) -> None:
        strategy.run(replica, args=(gradients,))

    step = tf.function(step, autograph=False) if graph else step
    trajectories: list[Trajectory] = []
    for gradients in case.gradients():
        step([split(rows) for k, rows in enumerate(zip(*gradients, strict=True)) if k not in without])
        local = [[rows_first(copy.numpy()) for copy in strategy.experimental_local_results(x.value)] for x in xs]
        trajectories = trajectories or [[] for _ in local[0]]
        for trajectory, parameters in zip(trajectories, zip(*local, strict=True), strict=True):
            trajectory.append(list(parameters))
    return trajectories


def apart(strategy: Any, without: Collection[int] = ()) -> None:
    """Take a step in which each replica lacks other gradients."""
    import tensorflow as tf

    case = Case(2, absent="somewhere")
    with strategy.scope():
        xs, optimizer = make(case, without)
    first = case.gradients()[0]

    def replica() -> None:
        mine = first[int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))]
        kept = [g for k, g in enumerate(mine) if k not in without]
        optimizer.apply([None if g is None else tf.constant(rows_last(g)) for g in kept], xs)

    tf.function(lambda: strategy.run(replica), autograph=False)()


def refusal(without: Collection[int]) -> str:
    """Return what such a step says on one worker of a cluster."""
    import tensorflow as tf

    from tests.keras.cluster_strategy import strategy

    try:
        apart(strategy(), without)
    except tf.errors.InvalidArgumentError as error:
        return str(error)
    return "not refused"
