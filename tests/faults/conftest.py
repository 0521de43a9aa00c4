"""Faults, counted for the table at the end."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from .summary import PROPERTY

Fault = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    """Count what is injected within a `with` block, and as survived if nothing in it fails."""

    @contextmanager
    def injected(kind: str, count: int = 1) -> Iterator[None]:
        survived = 0
        try:
            yield
            survived = count
        finally:
            request.node.user_properties.append((PROPERTY, (kind, count, survived)))

    return injected
