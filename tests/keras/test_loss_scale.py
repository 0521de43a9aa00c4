"""`LossScaleOptimizer` with one replica, on every backend."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from signsgd_keras import LossScaleOptimizer, Signum

from .backends import Array, assert_equal, everywhere, numbers
from .models import compiled, data

LR, FIRST, GROWTH = 2.0**-4, 8.0, 3


def _state(scaled: LossScaleOptimizer) -> list[float]:
    """Scale, counter and steps."""
    return [float(numbers(v)) for v in (scaled.dynamic_scale, scaled.step_counter, scaled.iterations)]


@everywhere
def test_one_replica_is_signum_with_a_scale() -> None:
    """Bit for bit, overflows included; in float32, where scales of two's powers change no gradient."""
    batches = [data(4, seed) for seed in range(6)]
    batches[2][0][1] = np.inf
    plain, inner = Signum(LR, 0.5, 0.5), Signum(LR, 0.5, 0.5)
    scaled, ends, states = LossScaleOptimizer(inner, FIRST, GROWTH), list[list[Array]](), []
    for optimizer, signum in ((plain, plain), (scaled, inner)):
        model = compiled(optimizer)
        for x, y in batches:
            model.train_on_batch(x, y)
            states += [_state(scaled)] if optimizer is scaled else []
        ends.append([numbers(v) for v in (*model.trainable_variables, *(signum._momentums or []))])
    assert_equal(*ends)
    assert states == [[8, 1, 1], [8, 2, 2], [4, 0, 3], [4, 1, 4], [4, 2, 5], [8, 0, 6]]


@everywhere
@pytest.mark.parametrize(
    ("first", "value", "last"), [(4.0, np.inf, 1.0), (0.5, np.inf, 0.5), (2.0**126, 0.0, 2.0**127)]
)
def test_a_scale_stays_where_it_can_come_back_from(first: float, value: float, last: float) -> None:
    x, scaled = keras.Variable(np.ones(3, np.float32)), LossScaleOptimizer(Signum(LR), first, 1)
    for _ in range(5):
        scaled.apply([keras.ops.convert_to_tensor(np.full(3, value, np.float32))], [x])
    assert float(numbers(scaled.dynamic_scale)) == last


@everywhere
def test_what_overwrites_a_variable_has_no_scale() -> None:
    """As the scales of float8 layers, which Keras hands over in place of gradients."""
    x, scale = (keras.Variable(np.ones(3, np.float32)) for _ in range(2))
    scale.overwrite_with_gradient = True
    scaled = LossScaleOptimizer(Signum(LR, 0.0, 0.0))
    for named in ([x, scale], None):
        value = keras.ops.convert_to_tensor(np.full(3, 0.75, np.float32))
        scaled.apply([value, value], named)
        assert numbers(scale).tolist() == [0.75] * 3
        scale.assign(np.ones(3, np.float32))
    assert numbers(x).tolist() == [1 - 2 * LR] * 3


@everywhere
def test_weights_are_loaded_before_it_is_built(tmp_path: Path) -> None:
    """With a warning, as into a bare Signum."""
    first, second = (compiled(LossScaleOptimizer(Signum(LR)), auto_scale_loss=False) for _ in range(2))
    first.fit(*data(4), verbose=0)
    first.save_weights(tmp_path / "first.weights.h5")
    with pytest.warns(UserWarning, match="'loss_scale_optimizer.*', because it is not built yet: call optimizer.build"):
        second.load_weights(tmp_path / "first.weights.h5")
    assert_equal(*[[numbers(v) for v in model.trainable_variables] for model in (first, second)])
    second.fit(*data(4), verbose=0)
    assert _state(second.optimizer) == [2.0**15, 1, 1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"initial_scale": 0.0}, "initial_scale must be above 0 and finite, got 0.0"),
        ({"initial_scale": "big"}, "initial_scale must be above 0 and finite, got 'big'"),
        ({"dynamic_growth_steps": 0}, "dynamic_growth_steps must be a whole number of 1 or more, got 0"),
    ],
    ids=str,
)
def test_settings_with_which_nothing_would_train_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LossScaleOptimizer(Signum(), **settings)


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="scales the loss of a Signum, got Adam: take keras.optimizers.LossScaleOpt"):
        LossScaleOptimizer(keras.optimizers.Adam())
