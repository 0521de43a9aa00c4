"""Who imports whom: neither front end the other, and TensorFlow only where a vote needs it. Each in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import signsgd_keras
from tests.tiers import nightly_where

from .backends import BACKENDS

pytestmark = pytest.mark.multiprocess

ROOT = Path(signsgd_keras.__file__).parents[1]
FRAMEWORKS = ("tensorflow", "jax", "torch", "lightning", "pytorch_lightning", "signsgd_lightning")

USE = f"""
import sys, numpy as np, keras
def imported(): return sorted(name for name in {FRAMEWORKS} if name in sys.modules)
print(imported())
import signsgd_keras
from signsgd_keras import *
print(sorted(name for name in signsgd_keras.__all__ if name in globals()))
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile(signsgd_keras.Signum(weight_decay=0.1, verdict_momentum=0.5, zeros="alternate", warmup_steps=2), "mse")
model.fit(np.ones((8, 4), "float32"), np.ones((8, 1), "float32"), verbose=0)
print(imported())
for name in ("MajorityVote", "MultiWorkerMajorityVoteStrategy", "LocalVote", "Adam"):
    try:
        print(getattr(signsgd_keras, name).__name__)
    except (ImportError, AttributeError) as error:
        print(error)
print(imported())
"""

TORCH_SIDE = """
import sys, torch, lightning
before = set(sys.modules)
import signsgd_lightning, pkgutil, importlib
for module in pkgutil.walk_packages(signsgd_lightning.__path__, "signsgd_lightning."):
    importlib.import_module(module.name)
x = torch.nn.Parameter(torch.ones(3))
optimizer = signsgd_lightning.Signum([x])
x.sum().backward()
optimizer.step()
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"keras", "tensorflow", "jax", "signsgd_keras"}))
"""


def printed(code: str, backend: str) -> list[str]:
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.parametrize("backend_name", nightly_where(lambda name: name == "torch", BACKENDS))
def test_the_optimizer_imports_no_other_framework(backend_name: str) -> None:
    """Nothing that Keras has not imported by itself; without TensorFlow a vote is refused with a sentence.

    Nor does `import *`, which has no name that votes there.
    """
    before, exported, after, *asked, at_last = printed(USE, backend_name)
    assert backend_name in before
    assert before == after == at_last
    voting = ["LocalVote", "MajorityVote", "MultiWorkerMajorityVoteStrategy", "ReplicasDifferError"]
    voting += ["VerifyReplicas", "VoteMonitor"]
    everywhere = ["GeometryMonitor", "LossScaleOptimizer", "Signum"]
    assert exported == repr(sorted(everywhere + voting * (backend_name == "tensorflow")))
    names = ["MajorityVote", "MultiWorkerMajorityVoteStrategy", "LocalVote"]
    if backend_name != "tensorflow":
        assert "tensorflow" not in before
        names = [
            f"{name} votes by tf.distribute and needs Keras' TensorFlow backend, got '{backend_name}': set "
            "KERAS_BACKEND=tensorflow before keras is imported"
            for name in names
        ]
    assert asked == [*names, "module 'signsgd_keras' has no attribute 'Adam'"]


@pytest.mark.nightly  # what is imported by default: tests/lightning/test_imports.py
def test_the_torch_side_imports_no_keras() -> None:
    assert printed(TORCH_SIDE, "tensorflow") == ["[]"]
