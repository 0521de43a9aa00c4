"""The table of faults: how many were injected, how many were survived."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

Fault = Callable[..., AbstractContextManager[None]]
PROPERTY = "fault"
"""Under which a test notes the kind of a fault, how often it was injected, and how often survived."""


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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a line for each kind of fault that was injected in this session."""
    injected, survived = Counter[str](), Counter[str]()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.when == "call":
                for name, value in report.user_properties:
                    if name == PROPERTY:
                        kind, count, good = value
                        injected[kind] += count
                        survived[kind] += good
    if not injected:
        return
    terminalreporter.write_sep("=", "faults")
    terminalreporter.write_line(f"{'fault':<76}{'injected':>10}{'survived':>10}{'lost':>6}")
    for kind, count in sorted(injected.items()):
        terminalreporter.write_line(f"{kind:<76}{count:>10}{survived[kind]:>10}{count - survived[kind]:>6}")
