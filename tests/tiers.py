"""Which cases of a test run by default, and which only where `-m nightly` asks for them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def nightly_where(rule: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Return cases for `pytest.mark.parametrize`, nightly where the rule says so; a tuple is several arguments."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.nightly] * rule(case))
        for case in cases
    ]
