"""Workers that differ where a vote needs them alike: all of them end with the same sentence, and nothing hangs."""

from typing import Any

import pytest

from tests.clusters import Cluster

from .cluster_strategy import strategy
from .models import arrays, compiled, data, net, same

pytestmark = pytest.mark.slow  # not yet seen to pass as a whole on a quiet machine: see that, then take this out


def _disagree(kind: str) -> tuple[str, list[Any]]:
    """Worker 1 differs; return the error of this worker, and its variables after three good steps together."""
    import keras
    import tensorflow as tf

    from signsgd_keras import Signum

    scope = strategy()
    odd = scope.cluster_resolver.task_id == 1
    settings: dict[str, Any] = {"beta_1": 0.5, "beta_2": 0.5}
    if odd and kind == "settings":
        settings["beta_2"] = 0.25
    layers = [keras.layers.Dense(3, name="between")] if odd and kind == "models" else []
    with scope.scope():
        model = compiled(Signum(0.125, **settings), make=lambda: net(*layers))
        if odd and kind == "learning rates":
            model.optimizer.learning_rate = 0.25
        if odd and kind == "steps":
            model.optimizer.iterations.assign(2)
    before = arrays(model.trainable_variables)
    try:
        model.fit(*data(12), batch_size=6, verbose=0)
    except tf.errors.InvalidArgumentError as error:
        return str(error), [same(arrays(model.trainable_variables), before)]
    return "no error", []


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "settings",
            "the workers disagree and cannot vote: their settings (beta_1, beta_2, verdict_momentum, zero_rule",
        ),
        ("learning rates", "the workers disagree and cannot vote: their learning rates differ"),
        ("steps", "the workers disagree and cannot vote: their numbers of steps taken differ"),
        ("models", "the workers disagree and cannot vote: their models (names and shapes of the variables) differ"),
    ],
)
def test_workers_that_disagree(kind: str, sentence: str, fresh_cluster: Any) -> None:
    pair: Cluster = fresh_cluster(2)
    for message, unchanged in pair.run(_disagree, kind):
        assert sentence in message
        assert unchanged == [True]
