"""Models of float8 layers, whose scales each replica writes by itself."""

import keras
import pytest

from signsgd_keras import Signum, VerifyReplicas
from tests.devices import mirrored

from .models import arrays, data, net

pytestmark = pytest.mark.multiprocess


def test_replicas_are_compared_but_for_their_scales() -> None:
    """Which have no momenta, either."""
    with mirrored(2).scope():
        model = net()
        model.quantize("float8")
        model.compile(Signum(0.125, verdict_momentum=0.5), "mse", auto_scale_loss=False)
    model.fit(*data(12), batch_size=4, verbose=0, callbacks=[VerifyReplicas(1)])
    arrays(v for v in model.trainable_variables if not v.overwrite_with_gradient)
    assert any(v.overwrite_with_gradient for v in model.trainable_variables)
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 3
