"""Workers that differ where a vote needs them alike: all of them end with the same sentence, and nothing hangs."""

from collections.abc import Callable
from typing import Any

import pytest

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
    model.fit(*data(12), batch_size=6, verbose=0)
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


def _versions() -> str:
    from signsgd_keras import Signum, agreement

    scope, before = strategy(), agreement.WIRE_VERSION
    agreement.WIRE_VERSION = before + scope.cluster_resolver.task_id
    try:
        with scope.scope():
            compiled(Signum()).fit(*data(12), batch_size=6, verbose=0)
    except ValueError as error:
        return str(error)
    finally:
        agreement.WIRE_VERSION = before
    return "no error"


def test_wire_versions(cluster: Callable[[int], Cluster]) -> None:
    for message in cluster(2).run(_versions):
        assert "worker 0 has «wire version 1» where worker 1 has «wire version 2»" in message


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


@pytest.mark.parametrize("kind", ["learning rates", "numbers of steps taken"])
def test_midway(kind: str, fresh_cluster: Callable[[int], Cluster]) -> None:
    for message, unchanged in fresh_cluster(2).run(_midway, kind):
        assert f"the workers disagree and cannot vote: their {kind} differ; worker by worker, as bits:" in message
        assert unchanged == [True]
