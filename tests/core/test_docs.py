"""What the packages say of themselves is true: the examples in their docstrings, and that core needs no framework."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import signsgd_core
import signsgd_keras
import signsgd_lightning
from tests import devices  # noqa: F401  before TensorFlow first runs anything

ROOT = Path(signsgd_core.__file__).parents[1]
MATHEMATICS = [
    "adversaries",
    "ballots",
    "membership",
    "network.costs",
    "network.traffic",
    "reference",
    "settings",
    "update",
    "vote",
    "wire",
]
FRAMEWORKS = ["torch", "tensorflow", "keras", "jax", "lightning", "sklearn", "matplotlib"]


def modules(package: ModuleType) -> list[str]:
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [package.__name__, *(module.name for module in found)]


@pytest.mark.parametrize("name", [*modules(signsgd_core), *modules(signsgd_lightning), *modules(signsgd_keras)])
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", MATHEMATICS)
def test_the_mathematics_has_examples(name: str) -> None:
    examples = doctest.DocTestFinder().find(importlib.import_module(f"signsgd_core.{name}"))
    assert any(test.examples for test in examples)


def test_core_imports_no_framework() -> None:
    every = "; ".join(f"import {name}" for name in modules(signsgd_core))
    code = f"import sys; {every}; print([name for name in {FRAMEWORKS} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[]\n", "")
