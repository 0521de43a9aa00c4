"""What an elastic vote refuses before it begins, what it loads, and which batches it draws."""

import pickle
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed._serialization import _streaming_save

from signsgd_lightning import Signum
from signsgd_lightning.checkpoint.loading import SAVED_BY
from tests.elastic import crew

pytest.importorskip("torchft", reason="the extra `elastic` is not installed")

from signsgd_lightning import ElasticBatches, enable_elastic_local_steps, enable_elastic_vote
from signsgd_lightning.elastic.state import SharedState, SharedSteps

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


class _Has:
    """Has a state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def test_a_state_that_a_newcomer_would_not_load() -> None:
    for value, held in ((timedelta(1), "datetime.timedelta"), (lambda: 0, "lambda")):
        with pytest.raises(TypeError, match=rf"state 'thing' has something else \(.*{held}.*\): leave it out"):
            enable_elastic_vote(*model(), lighthouse=NOWHERE, state={"thing": _Has(value)})
    enable_elastic_vote(*model(), lighthouse=NOWHERE, state={"thing": _Has(np.float64(2))}).close()


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match=r"hostname must be a name or an address .*, got 'no-such-host.invalid'"):
        enable_elastic_vote(*model(), lighthouse=NOWHERE, hostname="no-such-host.invalid")


def test_a_state_of_another_kind_of_run() -> None:
    net, _ = model()
    local = enable_elastic_local_steps(net, torch.optim.SGD(net.parameters()), lighthouse=NOWHERE)
    with pytest.raises(ValueError, match="an elastic vote at every step, not of local steps"):
        local.load_state_dict({"batches": 3})
    local.close()


def test_a_momentum_of_workers_that_have_no_number_is_nobodys() -> None:
    """Whoever goes on from such a checkpoint does as its page says, and is not warned."""
    net = nn.Linear(2, 1)
    optimizer = Signum(net.parameters())
    vote = enable_elastic_vote(net, optimizer, lighthouse=NOWHERE)
    assert SAVED_BY not in optimizer.state_dict()["param_groups"][0]
    vote.close()


class _Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"seen": 3}


def test_groups_that_the_others_added() -> None:
    """The newcomer has loaded nothing then. What a module keeps besides tensors is taken over."""
    nets = [_Extra(2, 1) for _ in range(2)]
    optimizers = [Signum(net.parameters(), betas=(0.0, 0.0)) for net in nets]
    here, there = (SharedState(SharedSteps(*pair), {}) for pair in zip(nets, optimizers, strict=True))
    there.load(here.save())
    assert torch.equal(nets[0].weight, nets[1].weight)
    optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    nets[0].weight.data.zero_()
    with pytest.raises(RuntimeError, match=r"the others have \[2\] parameter groups and it has \[1\]"):
        there.load(here.save())
    assert nets[1].weight.all()


@pytest.mark.multiprocess
def test_two_votes_of_one_process_need_two_lighthouses(tmp_path: Path) -> None:
    """A lighthouse counts all who ask it. The round that is open when local steps are closed is given up."""
    net, optimizer = model()
    other = nn.Linear(2, 1)
    begun = other.weight.detach().clone()
    with crew(tmp_path) as (_, lighthouse):
        place: dict[str, Any] = {"lighthouse": lighthouse.address, "min_workers": 1, "hostname": "127.0.0.1"}
        local = enable_elastic_local_steps(other, torch.optim.SGD(other.parameters(), lr=1.0), **place)
        vote = enable_elastic_vote(net, optimizer, **place)
        for one in (other, net):
            one(torch.ones(1, 2)).sum().backward()
        local.local.optimizers[0].step()
        with pytest.raises(ValueError, match="another elastic vote at .*: start a second lighthouse"):
            optimizer.step()
        assert not torch.equal(other.weight, begun)
        local.close()
        assert torch.equal(other.weight, begun)
        optimizer.step()
        assert vote.step == 1
        vote.close()


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
