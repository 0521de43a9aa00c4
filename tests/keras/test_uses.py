"""Documented uses in which a replica could vote with something else than its own gradient, or step alone."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from signsgd_keras import Signum
from tests.clusters import Cluster
from tests.devices import mirrored

from .models import Batch, arrays, compiled, data, dataset, net, replay, same, shares
from .test_imports import printed

pytestmark = pytest.mark.multiprocess

LR = 2.0**-4


def signum(**settings: Any) -> Signum:
    return Signum(LR, **{"beta_1": 0.5, "beta_2": 0.75, **settings})


def steps(replicas: int = 2) -> list[list[Batch]]:
    return shares(mirrored(replicas), dataset(*data(24), 6))


def fit(model: keras.Model, **options: Any) -> None:
    model.fit(*data(24), batch_size=6, shuffle=False, verbose=0, **options)


def loop(model: Any, optimizer: Any, strategy: Any) -> None:
    """A custom loop."""

    @tf.function  # type: ignore[untyped-decorator]
    def step(x: Any, y: Any) -> None:
        def run(x: Any, y: Any) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x) - y)) / strategy.num_replicas_in_sync
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        strategy.run(run, args=(x, y))

    for batch in strategy.experimental_distribute_dataset(dataset(*data(24), 6)):
        step(*batch)


@pytest.mark.parametrize("train", [loop, lambda model, optimizer, strategy: fit(model)], ids=["loop", "fit"])
def test_an_optimizer_made_and_built_outside_the_scope(train: Callable[..., None]) -> None:
    """It took the sign of the summed gradients, alone and in silence."""
    with mirrored(2).scope():
        model = net()
    optimizer = signum()
    optimizer.build(model.trainable_variables)
    model.compile(optimizer=optimizer, loss="mse")
    before = arrays(model.variables)
    with pytest.raises(ValueError, match=re.escape("under no strategy and is used under MirroredStrategy, where it")):
        train(model, optimizer, mirrored(2))
    assert same(arrays(model.variables), before)


@pytest.mark.parametrize("other", [1, 3])
def test_a_model_made_outside_the_scope(other: int) -> None:
    """Of no strategy, or of another one."""
    with mirrored(2).scope():
        optimizer = signum()
    with mirrored(3).scope() if other > 1 else tf.distribute.get_strategy().scope():
        model = net()
    with (
        mirrored(2).scope(),
        pytest.raises(ValueError, match="net/one/kernel was made outside of the MirroredStrategy"),
    ):
        optimizer.build(model.trainable_variables)


class Around(keras.optimizers.Optimizer):  # type: ignore[misc]
    """A wrapper as people write them: steps by the other's `update_step`, with what Keras made of the gradients."""

    def __init__(self, inner: Any) -> None:
        super().__init__(learning_rate=LR)
        self.inner_optimizer = inner

    def build(self, variables: list[Any]) -> None:
        if not self.built:
            super().build(variables)
            self.inner_optimizer.build(variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.inner_optimizer.update_step(gradient, variable, learning_rate)


def test_an_optimizer_around_it_that_takes_the_step_of_one_worker() -> None:
    """It had summed gradients in its hands, and nobody voted."""
    with mirrored(2).scope():
        model = compiled(Around(signum(name="mine")))
    before = arrays(model.variables)
    sentence = "update_step() is the step of one worker alone, and 'mine' votes among 2 replicas: call apply() of it"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        fit(model)
    assert same(arrays(model.variables), before)
    one = compiled(Around(signum()))  # with one replica it is what it was
    fit(one)
    whole = [[(x, y)] for x, y in dataset(*data(24), 6).as_numpy_iterator()]
    assert same(arrays(one.trainable_variables), replay(whole, LR, betas=(0.5, 0.75)).parameters)


@pytest.mark.parametrize("replicas", [1, 2])
def test_tensorflows_own_variables(replicas: int) -> None:
    with mirrored(replicas).scope():
        x, optimizer = tf.Variable([1.0, 2.0, 3.0]), signum(verdict_momentum=0.5, weight_decay=0.5)
    given = tf.constant([[1.0, -1.0, 1.0], [1.0, -1.0, -1.0]])

    def step() -> None:
        replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
        optimizer.apply([given[replica]], [x])

    mirrored(replicas).run(step)
    start = np.array([1, 2, 3], np.float32)
    expected = start - np.float32(LR) * (np.array([0.5, -0.5, 0.5], np.float32) + start / 2)  # a tie is first positive
    held = mirrored(replicas).experimental_local_results(x)
    assert same([v.numpy() for v in held], [expected] * replicas)


def both(*values: Any, **settings: Any) -> tuple[list[Any], Signum]:
    """Variables and an optimizer of two replicas."""
    with mirrored(2).scope():
        variables = [keras.Variable(np.ones(value, np.float32), name=f"x{k}") for k, value in enumerate(values)]
        optimizer = signum(**settings)
        optimizer.build(variables)
    return variables, optimizer


def test_a_gradient_of_another_shape_among_replicas() -> None:
    """Of one number it became a ballot whose other bits were those of nobody."""
    variables, optimizer = both(3, 9, beta_1=0.0)
    with pytest.raises(ValueError, match=re.escape("the gradient of x0 has shape (1,) and the variable (3,)")):
        mirrored(2).run(lambda: optimizer.apply([-tf.ones(1), tf.ones(9)], variables))
    assert same(arrays(variables), [np.ones(3, np.float32), np.ones(9, np.float32)])


def test_a_gradient_whose_shape_is_not_known() -> None:
    """As of a `tf.numpy_function`; a wrong one is found when the graph runs."""
    (x,), optimizer = both((2, 3))

    @tf.function  # type: ignore[untyped-decorator]
    def step(rows: Any) -> None:
        def run() -> None:
            given = tf.numpy_function(lambda n: np.full((n, 3), -1, np.float32), [rows], tf.float32)
            optimizer.apply([given], [x])

        mirrored(2).run(run)

    step(tf.constant(2))
    assert same(arrays([x]), [np.full((2, 3), 1 + LR, np.float32)])
    with pytest.raises(tf.errors.InvalidArgumentError, match="reshape"):
        step(tf.constant(1))


@pytest.mark.parametrize("replicas", [1, 2])
def test_what_a_variable_had_accumulated_ends_with_the_vote(replicas: int) -> None:
    """As with one replica, also where the variable has no gradient at the last of the steps and does not vote."""
    with mirrored(replicas).scope():
        a, b = (keras.Variable(np.ones(2, np.float32), name=name) for name in "ab")
        optimizer = signum(beta_1=0.0, gradient_accumulation_steps=2, zeros="abstain")
        optimizer.build([a, b])
    one, big = tf.ones(2), tf.constant([-8.0, -8.0])
    for grads, variables in (([one, big], [a, b]), ([one], [a]), ([one, one], [a, b]), ([one, one], [a, b])):
        mirrored(replicas).run(optimizer.apply, args=(grads, variables))
    assert arrays([a])[0].tolist() == [1 - 2 * LR] * 2
    assert arrays([b])[0].tolist() == [1 - LR] * 2


def _parameter_server() -> str:
    from tests.workers import free_port

    cluster = tf.train.ClusterSpec({"worker": [f"127.0.0.1:{free_port()}"], "ps": [f"127.0.0.1:{free_port()}"]})
    servers = [tf.distribute.Server(cluster, job, 0) for job in ("worker", "ps")]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    assert strategy.num_replicas_in_sync == len(servers) - 1 == 1
    with strategy.scope():
        model, optimizer = net(), signum()
        try:
            optimizer.build(model.trainable_variables)
        except ValueError as error:
            return str(error)
    return "no error"


def test_a_parameter_server(fresh_cluster: Callable[[int], Cluster]) -> None:
    """Its workers step one after the other, each alone, and count as one replica."""
    (message,) = fresh_cluster(1).run(_parameter_server)
    assert message.startswith("Signum cannot vote under ParameterServerStrategyV2: take tf.distribute.MirroredStrategy")


DATA_PARALLEL = """
import warnings, numpy as np, keras
keras.distribution.set_distribution(keras.distribution.DataParallel())
import signsgd_keras
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile(signsgd_keras.Signum(name="mine"), "mse")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.fit(np.ones((8, 4), "float32"), np.ones((8, 1), "float32"), verbose=0)
print(*{str(warning.message) for warning in caught if "mine" in str(warning.message)})
"""


def test_jax_devices_that_share_a_mean_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody votes there, which a user may not expect."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert printed(DATA_PARALLEL, "jax") == [
        "'mine' is one worker under keras.distribution.DataParallel, whose 2 devices take the sign of one mean "
        "gradient: nobody votes. A vote needs KERAS_BACKEND=tensorflow and tf.distribute"
    ]
