"""Every private or undocumented name of Keras and TensorFlow that the package touches is there, as it was."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf
from tensorflow.python.checkpoint import tensor_callable
from tensorflow.python.distribute import (
    collective_all_reduce_strategy,
    cross_device_ops,
    cross_device_utils,
    distribute_utils,
    mirrored_strategy,
)
from tensorflow.python.eager import context
from tensorflow.python.ops import collective_ops, control_flow_util

import signsgd_keras
from signsgd_keras import Signum, _compat
from tests.devices import mirrored

from .models import net, plain

BASE = keras.optimizers.Optimizer
COLLECTIVE = collective_all_reduce_strategy.CollectiveAllReduceExtended
LAUNCHER = cross_device_utils.CollectiveReplicaLauncher

FUNCTIONS: dict[str, tuple[Any, str, str]] = {
    # name: (owner, parameters, who needs it)
    "Optimizer._backend_apply_gradients": (BASE, "self, grads, trainable_variables", "Signum overrides it to vote"),
    "Optimizer._apply_weight_decay": (BASE, "self, variables", "Signum overrides it: step 8 decays"),
    "Optimizer._clip_gradients": (BASE, "self, grads", "Signum hands it to the vote: each replica clips by itself"),
    "Optimizer._get_variable_index": (BASE, "self, variable", "Signum.slot"),
    "Optimizer._use_weight_decay": (BASE, "self, variable", "Signum._decay"),
    "Optimizer._track_variable": (
        BASE,
        "self, variable",
        "Signum and LossScaleOptimizer, whose variables are their own",
    ),
    "Optimizer._update_model_variables_moving_average": (BASE, "self, trainable_variables", "Signum among replicas"),
    "Optimizer._overwrite_model_variables_with_average_value": (
        BASE,
        "self, trainable_variables",
        "Signum among replicas",
    ),
    "Optimizer._checkpoint_adapter": (
        BASE,
        "self, path",
        "Signum and LossScaleOptimizer override it to look into a checkpoint before it is restored",
    ),
    "Variable._trackable_children": (
        keras.Variable,
        "self, save_type, cache, kwargs",
        "ReplicaVariable, which a SavedModel asks",
    ),
    "Variable._serialize_to_tensors": (keras.Variable, "self", "ReplicaVariable writes the rows of all replicas"),
    "Variable._copy_trackable_to_cpu": (keras.Variable, "self, object_map", "ReplicaVariable, which may refuse it"),
    "Variable._restore_from_tensors": (keras.Variable, "self, restored_tensors", "ReplicaVariable reads them"),
    "tensor_callable.Callable": (tensor_callable, "tensor_callable, dtype, device", "_compat.read_when_saved"),
    "Optimizer.add_variable_from_reference": (
        BASE,
        "self, reference_variable, name, initializer",
        "Signum overrides it to give each replica its own momentum",
    ),
    "Layer._flatten_layers": (keras.layers.Layer, "self, include_self, recursive", "_compat.unbuilt_layers"),
    "LossScaleOptimizer.check_finite": (
        keras.optimizers.LossScaleOptimizer,
        "self, grads",
        "strategy._Extended, by which workers agree to skip a step",
    ),
    "CollectiveAllReduceExtended._call_for_each_replica": (COLLECTIVE, "self, fn, args, kwargs", "strategy._Extended"),
    "CollectiveAllReduceExtended.__init__": (
        COLLECTIVE,
        "self, container_strategy, cluster_resolver, communication_options, devices",
        "MultiWorkerMajorityVoteStrategy.__init__",
    ),
    "CollectiveReplicaLauncher._next_instance_key": (LAUNCHER, "self", "_compat._launch"),
    "CollectiveReplicaLauncher._get_ordering_token": (LAUNCHER, "self", "_compat._launch"),
    "CrossDeviceOps._gather_implementation": (
        tf.distribute.CrossDeviceOps,
        "self, per_replica_value, destinations, axis, options",
        "MajorityVote hands it on",
    ),
    "distribute_utils.regroup": (distribute_utils, "values, wrap_class, always_wrap", "_compat.per_replica"),
    "Context.check_collective_ops_peer_health": (
        context.Context,
        "self, task, timeout_in_ms",
        "_compat.lost_workers",
    ),
    "control_flow_util.GraphOrParentsInXlaContext": (control_flow_util, "graph", "_compat.in_xla"),
    "collective_ops.all_to_all_v2": (
        collective_ops,
        "t, group_size, group_key, instance_key, communication_hint, timeout, ordering_token, name",
        "_compat.all_to_all",
    ),
    "collective_ops.all_gather_v2": (
        collective_ops,
        "t, group_size, group_key, instance_key, communication_hint, timeout, ordering_token, name",
        "_compat.all_gather",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    owner, parameters, needed_by = FUNCTIONS[name]
    version = f"Keras {keras.__version__}, TensorFlow {tf.__version__}"
    function = getattr(owner, name.split(".")[-1], None)
    assert function is not None, f"{name} is gone from {version}; who needs it: {needed_by}"
    found = ", ".join(inspect.signature(tf.__internal__.decorator.unwrap(function)[1]).parameters)
    assert found == parameters, f"{name}({parameters}) is now {name}({found}) in {version}; who needs it: {needed_by}"


def attributes() -> Iterator[tuple[str, Any, str, str]]:
    """Owner in words, owner, name, and who needs it."""
    with mirrored(2).scope():
        optimizer = Signum(0.5, use_ema=True, gradient_accumulation_steps=2)
        optimizer.build(net().trainable_variables)
    for name, needed_by in {
        "_distribution_strategy": "_compat.strategy_of",
        "_iterations": "Signum, which counts accumulated steps",
        "_trainable_variables": "Signum, and _compat.trainable_variables",
        "_accumulated_gradients": "Signum hands them to the vote",
        "_variables": "Signum.variables and LossScaleOptimizer",
        "_momentums": "state.MOMENTUM: the name in tf.train.Checkpoint, which is ours",
    }.items():
        yield "an optimizer", optimizer, name, needed_by
    yield "MirroredStrategy.extended", mirrored(2).extended, "_cross_device_ops", "_compat.cross_device_ops"
    alone = tf.distribute.MultiWorkerMirroredStrategy()
    yield "MultiWorkerMirroredStrategy.extended", alone.extended, "_host_cross_device_ops", "_compat.host_ops"
    op = _compat.cross_device_ops(plain())
    for name, needed_by in {
        "_group_size": "_compat.group_size",
        "_devices": "_compat.gather_now",
        "_launchers": "_compat._launch",
    }.items():
        yield "CollectiveAllReduce", op, name, needed_by
    for name in ("_device", "_group_size", "_group_key", "_options"):
        yield "CollectiveReplicaLauncher", op._launchers[0], name, "_compat._launch"
    yield "Options", op._launchers[0]._options, "implementation", "_compat._launch"
    yield "Options", op._launchers[0]._options, "timeout_seconds", "_compat._launch"


def test_attributes() -> None:
    gone = [
        f"{name} of {words}; who needs it: {needed_by}"
        for words, owner, name, needed_by in attributes()
        if not hasattr(owner, name)
    ]
    assert not gone, f"gone from Keras {keras.__version__} or TensorFlow {tf.__version__}: {gone}"


@pytest.mark.parametrize("shards", [None, 1e-6])
def test_saved_name(shards: float | None, tmp_path: Path) -> None:
    """Of the optimizer, of one within it, and of what Keras' h5 files hold no group of; shards are of one kilobyte."""
    names: list[str | None] = []

    class Asks(keras.optimizers.LossScaleOptimizer):  # type: ignore[misc]
        def load_own_variables(self, store: Any) -> None:
            names.extend(_compat.saved_name(store, child) for child in ("", "inner_optimizer", "none"))

    for around in (keras.optimizers.LossScaleOptimizer, Asks):
        model = net()
        model.compile(around(keras.optimizers.Adam(name="inner"), name="outer"), "mse")
        model.optimizer.build(model.trainable_variables)
        if around is Asks:
            model.load_weights(tmp_path / f"a.weights.{'json' if shards else 'h5'}")
        else:
            model.save_weights(tmp_path / f"a.weights.{'json' if shards else 'h5'}", max_shard_size=shards)
    assert names == ["outer", "inner", None]
    assert _compat.saved_name({}) is None


def test_saved_variables(tmp_path: Path) -> None:
    optimizer, model = keras.optimizers.Adam(name="theirs"), net()
    optimizer.build(model.trainable_variables[:1])
    path = tf.train.Checkpoint(model=model, a=optimizer, b=Signum(0.5, name="ours")).save(tmp_path / "a")
    assert _compat.saved_variables(path) == [
        [
            "theirs/iteration",
            "theirs/learning_rate",
            *(f"theirs/net_one_kernel_{of}" for of in ("momentum", "velocity")),
        ],
        ["ours/iteration", "ours/learning_rate"],
    ]
    assert _compat.saved_variables(tf.train.Checkpoint(model=model).save(tmp_path / "b")) == []
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:  # by names, without a graph of objects
        session.run(tf.compat.v1.get_variable("x", initializer=1.0).initializer)
        assert _compat.saved_variables(tf.compat.v1.train.Saver().save(session, str(tmp_path / "c"))) == []


def test_what_the_names_stand_for() -> None:
    """A name that stays and changes its meaning would be worse than one that goes."""
    assert issubclass(mirrored_strategy.MirroredExtended, tf.distribute.StrategyExtended)
    assert isinstance(_compat.cross_device_ops(mirrored(2)), signsgd_keras.MajorityVote)
    assert isinstance(_compat.cross_device_ops(plain()), cross_device_ops.CollectiveAllReduce)
    assert _compat.group_size(_compat.cross_device_ops(plain())) == 2
    with mirrored(2).scope():
        assert _compat.strategy_of(keras.optimizers.SGD()) is mirrored(2)
    values = _compat.per_replica([tf.constant(1), tf.constant(2)])
    assert isinstance(values, tf.distribute.DistributedValues)
    assert [int(v) for v in mirrored(2).experimental_local_results(values)] == [1, 2]


@pytest.mark.parametrize("compiled", [True, False])
def test_in_xla(compiled: bool) -> None:
    seen = []

    @tf.function(jit_compile=compiled)  # type: ignore[untyped-decorator]
    def step(x: tf.Tensor) -> tf.Tensor:
        seen.append(_compat.in_xla())
        return x + 1

    step(tf.constant(1.0))
    assert set(seen) == {compiled}


@pytest.mark.parametrize("steps", [1, 2])
def test_in_keras_loop(steps: int) -> None:
    """Keras' own names for its functions: one batch's, and the loop over several."""
    seen = []

    class Model(keras.Sequential):  # type: ignore[misc]
        def train_step(self, given: Any) -> dict[str, Any]:
            seen.append(_compat.in_keras_loop())
            return dict(super().train_step(given))

    model = Model([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=steps)
    model.fit(tf.ones((8, 4)), tf.ones((8, 1)), batch_size=4, verbose=0)
    assert set(seen) == {steps > 1}


def test_no_other_module_imports_private_tensorflow() -> None:
    for path in Path(signsgd_keras.__file__).parent.rglob("*.py"):
        if path.name != "_compat.py":
            found = re.findall(r"^.*(?:tensorflow\.python|keras\.src|tf\.__internal__).*$", path.read_text(), re.M)
            assert not found, f"{path.name} touches a private module; _compat.py is the place: {found}"
