import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .clusters import Cluster, Nursery
from .conformance import summary as conformance
from .faults import summary as faults
from .workers import Workers

with contextlib.suppress(ImportError):
    import triton  # noqa: F401  # before TensorFlow: of the LLVM that either has, the second to come ends the process

os.environ["KERAS_BACKEND"] = "tensorflow"  # of this process; the others are in processes of their own
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that spin where all cores are busy cost a fifth


LEFT_OUT = ("nightly", "slow")
"""Markers of tests that run only where ``-m`` names them, whatever else it says."""

KERAS_PROCESSES = {"nursery", "backend", "cluster", "fresh_cluster"}
STARTS_PROCESSES = {"workers", *KERAS_PROCESSES}
"""Fixtures."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts processes, leave out what is not asked for, and put together what shares processes."""
    kept, left = list[pytest.Item](), list[pytest.Item]()
    absent = [marker for marker in LEFT_OUT if marker not in config.option.markexpr]
    for item in items:
        if STARTS_PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker("multiprocess")
        (left if any(map(item.get_closest_marker, absent)) else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
    items[:] = sorted(kept, key=_neighbours)


def _neighbours(item: pytest.Item) -> tuple[bool, bool]:
    """Torch's processes first and Keras' last: of two that run tests, one then starts the former, one the latter."""
    names = set(getattr(item, "fixturenames", ()))
    keras = "keras" in item.nodeid or ("workers" not in names and bool(KERAS_PROCESSES & names))
    return keras, not STARTS_PROCESSES & names


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the conformance tests compared, and what the fault tests injected, of all processes that ran them."""
    conformance.write_summary(terminalreporter)
    faults.write_summary(terminalreporter)


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    pool = Workers(8)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Callable[[str], Nursery]]:
    """Backend -> the process that forks processes with Keras on that backend."""
    opened: dict[str, Nursery] = {}

    def of(backend: str) -> Nursery:
        if backend not in opened:
            opened[backend] = Nursery(backend)
        return opened[backend]

    yield of
    for one in opened.values():
        one.close()


@pytest.fixture(scope="session")
def backend(nursery: Callable[[str], Nursery]) -> Iterator[Callable[[str], Cluster]]:
    """Backend -> one process with Keras on that backend."""
    opened: dict[str, Cluster] = {}

    def of(name: str) -> Cluster:
        if name not in opened:
            opened[name] = Cluster(nursery(name), 1)
        return opened[name]

    yield of
    for one in opened.values():
        one.close()


@pytest.fixture(scope="session")
def cluster(nursery: Callable[[str], Nursery]) -> Iterator[Callable[[int], Cluster]]:
    """Number of workers -> that many processes of one TensorFlow cluster, shared by tests that leave them alive."""
    opened: dict[int, Cluster] = {}

    def of(size: int) -> Cluster:
        if size in opened and opened[size].failed:
            opened.pop(size).close()
        if size not in opened:
            opened[size] = Cluster(nursery("tensorflow"), size)
        return opened[size]

    yield of
    for one in opened.values():
        one.close()


@pytest.fixture
def fresh_cluster(nursery: Callable[[str], Nursery]) -> Iterator[Callable[[int], Cluster]]:
    """As `cluster`, for one test that may kill some."""
    opened: list[Cluster] = []

    def of(size: int) -> Cluster:
        opened.append(Cluster(nursery("tensorflow"), size))
        return opened[-1]

    yield of
    for one in opened:
        one.close()
