"""What an elastic vote refuses before it begins, what it loads, and which batches it draws."""

import pickle
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._serialization import _streaming_save

from signsgd_lightning import Signum
from tests.lightning.test_imports import printed

pytest.importorskip("torchft", reason="the extra `elastic` is not installed")

from signsgd_lightning import ElasticBatches, enable_elastic_vote

NOWHERE = "http://127.0.0.1:9"


def model() -> tuple[nn.Module, Signum]:
    net = nn.Linear(2, 1)
    return net, Signum(net.parameters(), betas=(0.0, 0.0))


def test_without_a_lighthouse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    with pytest.raises(ValueError, match="torchft_lighthouse --min_replicas 1"):
        enable_elastic_vote(*model())


@pytest.mark.parametrize("min_workers", [0, 1.5, -1])
def test_min_workers(min_workers: Any) -> None:
    with pytest.raises(ValueError, match="min_workers must be a whole number of 1 or more"):
        enable_elastic_vote(*model(), lighthouse=NOWHERE, min_workers=min_workers)


def test_another_optimizer() -> None:
    net, _ = model()
    with pytest.raises(TypeError, match="optimizer 0 is SGD"):
        enable_elastic_vote(net, torch.optim.SGD(net.parameters()), lighthouse=NOWHERE)  # type: ignore[arg-type]


def test_what_votes_already() -> None:
    net, optimizer = model()
    enable_elastic_vote(net, optimizer, lighthouse=NOWHERE).close()
    with pytest.raises(ValueError, match="votes already"):
        enable_elastic_vote(net, optimizer, lighthouse=NOWHERE)


def test_after_close() -> None:
    net, optimizer = model()
    vote = enable_elastic_vote(net, optimizer, lighthouse=NOWHERE)
    assert (vote.step, vote.workers, optimizer.zeros) == (0, 0, "alternate")
    vote.close()
    vote.close()
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="was closed"):
        optimizer.step()


def test_nothing_moves_before_the_commit() -> None:
    """All verdicts are there, and the step may not be committed."""
    net, optimizer = model()
    vote = enable_elastic_vote(net, optimizer, lighthouse=NOWHERE, min_workers=1)
    net(torch.ones(1, 2)).sum().backward()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ZeroDivisionError):
        vote._vote.take(optimizer.step_input(), lambda: 1 // 0)  # type: ignore[arg-type]
    assert all(torch.equal(p, x) for p, x in zip(net.parameters(), before, strict=True))
    assert vote.step == 0
    vote.close()


class _Code:
    def __reduce__(self) -> Any:
        return print, ("code from another worker ran",)


@pytest.fixture
def served() -> Iterator[tuple[str, list[Any]]]:
    """Where to get what is first in a list, as another worker sends it."""
    objects: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            _streaming_save(objects[0], self.wfile)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/checkpoint/", objects
    server.shutdown()
    server.server_close()


def test_a_state_with_code_in_it_is_refused(served: tuple[str, list[Any]], capfd: pytest.CaptureFixture[str]) -> None:
    from signsgd_lightning.elastic.transport import SafeHTTP

    address, objects = served
    http = SafeHTTP(timedelta(seconds=5), "127.0.0.1")
    try:
        objects[:] = [{"a": torch.ones(3), "b": [1, "c", None]}]
        found = http.recv_checkpoint(0, address, 7, timedelta(seconds=5))
        assert found["a"].tolist() == [1, 1, 1]
        assert found["b"] == [1, "c", None]
        objects[:] = [{"a": torch.ones(3), "b": _Code()}]
        with pytest.raises(pickle.UnpicklingError, match="[Uu]nsupported"):
            http.recv_checkpoint(0, address, 7, timedelta(seconds=5))
    finally:
        http.shutdown()
    assert "code from another worker" not in capfd.readouterr().out


def test_batches() -> None:
    """Every epoch has each batch once, whoever draws it, in an order of its own."""
    place = SimpleNamespace(next_batch=0, begin=int)
    batches = ElasticBatches(10, 3, place, seed=5)
    epochs = list[list[int]]()
    for epoch in range(2):
        drawn = list[int]()
        for k in range(3):
            place.next_batch = 3 * epoch + k
            drawn += next(iter(batches))
        assert len(set(drawn)) == 9
        epochs.append(drawn)
    assert epochs[0] != epochs[1]
    assert next(ElasticBatches(10, 3, place, seed=5)) == next(batches)
    assert next(ElasticBatches(10, 3, place, seed=6)) != next(batches)
    with pytest.raises(ValueError, match="at most the 10 examples, got 11"):
        ElasticBatches(10, 11, place)


IMPORTED = """
import sys, signsgd_lightning
print("torchft" in sys.modules)
signsgd_lightning.enable_elastic_vote
print("torchft" in sys.modules)
"""


@pytest.mark.multiprocess
def test_torchft_is_imported_when_asked_for() -> None:
    """Where it is not installed: see test_imports.py."""
    assert printed(IMPORTED) == ["False", "True"]
