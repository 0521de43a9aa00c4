"""Files of an earlier version load, and training goes on; `tests/fixtures/keras/write.py` made them."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.devices import mirrored  # noqa: F401  before TensorFlow runs
from tests.fixtures.keras import write
from tests.tiers import nightly_where

pytestmark = pytest.mark.multiprocess

FOLDER = Path(__file__).parents[1] / "fixtures" / "keras"


def _from(name: str, kind: str, folder: Path) -> Any:
    """Return a case's model with the state of a file."""
    if kind == "keras":
        with write.strategy(write.CASES[name][0]).scope():
            return keras.models.load_model(folder / "a.keras")
    made = write.model(name)
    if kind == "weights.h5":
        made.load_weights(folder / "a.weights.h5")
    else:
        tf.train.Checkpoint(model=made, optimizer=made.optimizer).read(str(folder / "a")).assert_consumed()
    return made


CASES = list(product(write.CASES, ("keras", "weights.h5", "tf.train.Checkpoint")))
COVERING = {("replicas", "keras"), ("scaled", "weights.h5"), ("replicas", "tf.train.Checkpoint"), ("alone", "keras")}


@pytest.mark.parametrize(("name", "kind"), nightly_where(lambda case: case not in COVERING, CASES))
def test_training_goes_on(name: str, kind: str, tmp_path: Path) -> None:
    shutil.unpack_archive(FOLDER / f"{name}.tar.gz", tmp_path)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    made = _from(name, kind, tmp_path)
    for rows, right in zip(write.state(made), numbers["saved"], strict=True):
        np.testing.assert_array_equal(rows, right)
    write.fit(made, seed=1)
    for rows, right in zip(write.state(made), numbers["later"], strict=True):
        # To the last bit or two: TensorFlow's products round as the processor adds, and another one wrote the file.
        np.testing.assert_allclose(rows, right, rtol=1e-6)
