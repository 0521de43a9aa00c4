"""Workers that differ where a vote needs them alike: all of them end with the same sentence, and nothing hangs."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from signsgd_core.wire import WIRE_VERSION
from tests.clusters import Cluster

from .cluster_strategy import strategy
from .models import arrays, compiled, data, net, same

SETTINGS = {
    "beta_2": (0.5, 0.25),
    "verdict_momentum": (0.0, 0.5),
    "weight_decay": (0.0, 0.5),
    "gradient_accumulation_steps": (None, 2),
    "global_clipnorm": (None, 1.0),
    "warmup_steps": (0, 3),
    "zeros": ("alternate", "abstain"),
}
"""Of worker 0 and of worker 1; `weight_decay=None` is 0."""


def _settings() -> list[tuple[str, bool]]:
    """Build one optimizer for each setting in which worker 1 differs, then train with a good one."""
    from signsgd_keras import Signum

    scope, found = strategy(), []
    for name, values in SETTINGS.items():
        own: dict[str, Any] = {"beta_1": 0.5, "beta_2": 0.5, name: values[scope.cluster_resolver.task_id]}
        with scope.scope():
            model = compiled(Signum(0.125, **own))
        before = arrays(model.trainable_variables)
        try:
            model.fit(*data(12), batch_size=6, verbose=0)
        except ValueError as error:
            found.append((str(error), same(arrays(model.trainable_variables), before)))
    with scope.scope():
        model = compiled(Signum(0.125))
    before = arrays(model.trainable_variables)
    model.fit(*data(12), batch_size=4, verbose=0)  # an odd number of steps never leads back
    return [*found, ("trained", same(arrays(model.trainable_variables), before))]


def test_settings(cluster: Callable[[int], Cluster]) -> None:
    runs = cluster(2).run(_settings)
    assert runs[0] == runs[1]
    for (name, (first, second)), (message, unchanged) in zip(SETTINGS.items(), runs[0], strict=False):
        name = {"zeros": "zero_rule"}.get(name, name)
        assert (
            f"the workers disagree and cannot vote: worker 0 has «{name}={first!r}» where worker 1 has "
            f"«{name}={second!r}». Build the same model and the same optimizer, with the same settings, on every "
            "worker."
        ) in message
        assert unchanged
    assert runs[0][-1] == ("trained", False)


def _models(order: list[str]) -> str:
    """Two layers of one shape, of which worker 1 has the names the other way round."""
    import keras

    from signsgd_keras import Signum

    scope = strategy()
    names = order[:: -1 if scope.cluster_resolver.task_id else 1]
    with scope.scope():
        model = compiled(Signum(0.125), make=lambda: net(*(keras.layers.Dense(3, name=name) for name in names)))
    try:
        model.fit(*data(12), batch_size=6, verbose=0)
    except ValueError as error:
        return str(error)
    return "no error"


def _variables(kind: str) -> str:
    """Worker 1 alone does something else with a variable, which every worker moves by itself."""
    import keras

    from signsgd_keras import Signum

    second = strategy().cluster_resolver.task_id == 1

    def make() -> Any:
        model = net()
        if second and kind == "constraint":
            model.layers[0].kernel.constraint = keras.constraints.MaxNorm(2)
        return model

    with strategy().scope():
        optimizer = Signum(0.125, weight_decay=0.5)
        if second and kind == "weight decay":
            optimizer.exclude_from_weight_decay(var_names=["bias"])
        model = compiled(optimizer, make)
    if second and kind == "initial values":
        model.layers[1].kernel.assign(-model.layers[1].kernel)
    before = arrays(model.trainable_variables)
    try:
        model.fit(*data(12), batch_size=6, verbose=0)
    except ValueError as error:
        assert same(arrays(model.trainable_variables), before)
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "weight decay",
            "0 has «net/one/bias: shape (3,)» where worker 1 has «net/one/bias: shape (3,), no weight decay»",
        ),
        (
            "constraint",
            "0 has «net/one/kernel: shape (4, 3)» where worker 1 has «net/one/kernel: shape (4, 3), constraint M",
        ),
        ("initial values", "worker 0 has «net/two/kernel: initial values "),
    ],
)
def test_what_workers_do_with_a_variable(kind: str, sentence: str, cluster: Callable[[int], Cluster]) -> None:
    """They drifted apart, and nothing was said: weights that one worker alone loads, above all."""
    for message in cluster(2).run(_variables, kind):
        assert sentence in message
        assert "Where values differ, load them on all, not on one." in message


def _versions() -> str:
    from signsgd_keras import Signum
    from signsgd_keras.vote import agreement

    scope, before = strategy(), agreement.WIRE_VERSION  # type: ignore[attr-defined]
    agreement.WIRE_VERSION = before + scope.cluster_resolver.task_id  # type: ignore[attr-defined]
    try:
        with scope.scope():
            compiled(Signum()).fit(*data(12), batch_size=6, verbose=0)
    except ValueError as error:
        return str(error)
    finally:
        agreement.WIRE_VERSION = before  # type: ignore[attr-defined]
    return "no error"


def test_wire_versions(cluster: Callable[[int], Cluster]) -> None:
    for message in cluster(2).run(_versions):
        versions = f"worker 0 has «wire version {WIRE_VERSION}» where worker 1 has «wire version {WIRE_VERSION + 1}»"
        assert versions in message


def test_models(cluster: Callable[[int], Cluster]) -> None:
    for message in cluster(2).run(_models, ["a", "b"]):
        assert "worker 0 has «net/a/kernel: shape (3, 3)» where worker 1 has «net/b/kernel: shape (3, 3)»" in message


def _midway(kind: str) -> tuple[str, list[bool]]:
    """Two good steps together, then worker 1 differs; return the error and whether the error changed anything."""
    import tensorflow as tf

    from signsgd_keras import Signum

    scope = strategy()
    with scope.scope():
        model = compiled(Signum(0.125, 0.5, 0.5))
    model.fit(*data(12), batch_size=6, verbose=0)
    before = arrays(model.trainable_variables)
    if scope.cluster_resolver.task_id == 1:
        if kind == "learning rates":
            model.optimizer.learning_rate = 0.25
        else:
            model.optimizer.iterations.assign(5)
    try:
        model.fit(*data(12), batch_size=6, verbose=0)
    except tf.errors.InvalidArgumentError as error:
        return str(error), [same(arrays(model.trainable_variables), before)]
    return "no error", []


@pytest.mark.parametrize("kind", [pytest.param("learning rates", marks=pytest.mark.nightly), "numbers of steps taken"])
def test_midway(kind: str, fresh_cluster: Callable[[int], Cluster]) -> None:
    for message, unchanged in fresh_cluster(2).run(_midway, kind):
        assert f"the workers disagree and cannot vote: their {kind} differ; worker by worker, as bits:" in message
        assert unchanged == [True]


def _alone() -> list[tuple[str, bool]]:
    """Make what exchanges between machines where no variable names them; return what was said, and whether of here."""
    from signsgd_keras import LocalVote, MultiWorkerMajorityVoteStrategy

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LocalVote(strategy=MultiWorkerMajorityVoteStrategy())
        LocalVote()
    return [(str(one.message), one.filename == __file__) for one in caught if "TF_CONFIG" in str(one.message)]


def test_a_forgotten_cluster(backend: Callable[[str], Cluster]) -> None:
    """And what is handed a strategy leaves that to it."""
    said = "TF_CONFIG is not set, so this process trains alone and exchanges nothing: set it on every machine"
    assert backend("tensorflow").run(_alone) == [[(said, True)] * 2]
