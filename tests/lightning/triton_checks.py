"""The Triton kernels against NumPy, bit for bit; test_triton.py runs this file, in the interpreter and on a GPU.

TRITON_INTERPRET=1 pytest -n 0 tests/lightning/triton_checks.py
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import signsgd_core as core
from signsgd_lightning import kernels
from signsgd_lightning.kernels import NumpyKernel, triton_loops, triton_tally
from signsgd_lightning.kernels.cuda import TritonKernel
from signsgd_lightning.views import FlatView, lay_out
from tests.conformance.cases import Case, assert_reference
from tests.conformance.torch_runs import alone, vote
from tests.workers import fresh_workers

from .test_kernels import DTYPES, SETTINGS, ZEROS, bits, finite, group, numbers, one_step, outcome, views_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LOOPS: list[Any] = [triton_loops.cast, triton_loops.apply, triton_loops.alone, triton_tally.verdict]
PAIRS = [
    pytest.param(chosen, DTYPES[(k + j) % 4], ZEROS[(k + j) % 3], marks=[pytest.mark.nightly] * j)
    for k, chosen in enumerate(SETTINGS)
    for j in (0, 1)
]


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The loops that were launched, one after the other."""
    names: list[str] = []
    for loop in LOOPS:
        loop.add_pre_run_hook(lambda *args, name=loop.__name__, **kwargs: names.append(name))
    yield names
    for loop in LOOPS:
        loop.pre_run_hooks.clear()


@pytest.mark.parametrize(("chosen", "dtype", "zeros"), PAIRS, ids=str)
def test_a_voted_step(chosen: dict[str, Any], dtype: torch.dtype, zeros: Any) -> None:
    step, first = (1, 0) if dtype.itemsize == 4 else (4, 16)
    outcomes = []
    for kernel, device in ((TritonKernel(), DEVICE), (NumpyKernel(), "cpu")):
        views, state = views_of(step, dtype, chosen, None if zeros == "alternate" else 0.37, step, device)
        outcomes.append([one_step(kernel, views, zeros, step, first), *outcome(views, state)])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(("chosen", "dtype", "zeros"), PAIRS, ids=str)
@torch.no_grad()
def test_a_step_alone(chosen: dict[str, Any], dtype: torch.dtype, zeros: Any) -> None:
    step = 1 if dtype.itemsize == 4 else 4
    outcomes = []
    for kernel, device in ((TritonKernel(), DEVICE), (NumpyKernel(), "cpu")):
        views, state = views_of(step, dtype, chosen, 0.37, step, device)
        kernel.alone(views, zeros, step)
        for s in views:
            s.finish()
        outcomes.append(outcome(views, state))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("of", ["gradient", "parameter"])
@torch.no_grad()
def test_memory_that_is_not_the_value(of: str) -> None:
    """A negative bit: the loops are launched on a copy, or not at all."""
    values, chosen = torch.linspace(-1, 1, 2_100), group(0, betas=(0.9, 0.99), verdict_momentum=0.5)
    for kernel, device in ((TritonKernel(), DEVICE), (NumpyKernel(), "cpu")):
        lazy = torch.complex(torch.zeros(2_100), -values).conj().imag.to(device)
        p = nn.Parameter(lazy if of == "parameter" else torch.ones(2_100, device=device))
        p.grad = lazy if of == "gradient" else torch.ones(2_100, device=device)
        view = FlatView(p, chosen, defaultdict[Tensor, dict[str, Tensor]](dict), True)
        lay_out([view])
        start = p.detach().clone()
        kernel.alone([view], "abstain", 0)
        view.finish()
        expected = start.cpu() - chosen["lr"] * 0.5 * (values.sign() if of == "gradient" else 1.0)
        assert torch.equal(p.detach().cpu().resolve_neg(), expected)


def some(device: str, first: int, chosen: dict[str, Any]) -> tuple[list[FlatView], Any]:
    """A tensor of several blocks, of which the first has bit `first`, and a small one behind it."""
    random, state, views = np.random.default_rng(first), defaultdict[Tensor, dict[str, Tensor]](dict), []
    for size in (first, 2_100, 3):
        p = nn.Parameter(finite(random, size, torch.float32).to(device))
        p.grad = numbers(random, size, torch.float32).to(device)
        views.append(FlatView(p, chosen, state, True))
    lay_out(views)
    return views, state


@pytest.mark.parametrize("first", [0, 1, 31, 32, 37])
@torch.no_grad()
def test_words_that_lie_across_programs(first: int) -> None:
    """In blocks of the vote that end in the midst of words of the tensors."""
    outcomes = []
    for kernel, device in ((TritonKernel(), DEVICE), (NumpyKernel(), "cpu")):
        views, state = some(device, first, group(0, betas=(0.9, 0.99), verdict_momentum=0.5))
        ballots = []
        for lo, hi in ((0, 1_152), (1_152, views[-1].stop)):
            ballots.append(torch.zeros(2, 8 * -(-(hi - lo) // 64), dtype=torch.uint8, device=device))
            kernel.cast(views, lo, hi, "abstain", 0, 0, ballots[-1])
            kernel.apply(views, lo, hi, ballots[-1])
        outcomes.append([*map(bits, ballots), *outcome(views, state)])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("zeros", ZEROS)
@torch.no_grad()
def test_the_ballot_is_cores(zeros: core.Zeros) -> None:
    views, _ = some(DEVICE, 5, group(3, betas=(0.0, 0.0)))
    ballot = torch.zeros(core.planes(zeros), 264, dtype=torch.uint8, device=DEVICE)
    TritonKernel().cast(views, 0, 2_108, zeros, 3, 2, ballot)
    gradients = [s.raw_gradient.cpu().numpy() for s in views]
    assert bits(ballot) == core.pack(core.finite(np.concatenate(gradients)), zeros, step=3, worker=2).tobytes()


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 33])
def test_verdicts(workers: int, zeros: core.Zeros) -> None:
    random = np.random.default_rng(workers)
    length = 8 * random.integers(1, 700)
    ballots = torch.from_numpy(random.integers(0, 256, (workers, core.planes(zeros), length), dtype=np.uint8))
    for masks in (None, torch.from_numpy(random.integers(0, 256, (workers, length), dtype=np.uint8))):
        there = None if masks is None else masks.to(DEVICE)
        verdict = TritonKernel().verdict(ballots.to(DEVICE), zeros, 3, there).cpu()
        assert torch.equal(verdict, NumpyKernel().verdict(ballots, zeros, 3, masks))


@torch.no_grad()
def test_one_launch_a_dtype_and_group(launches: list[str]) -> None:
    state, views = defaultdict[Tensor, dict[str, Tensor]](dict), []
    for chosen in (group(0, betas=(0.9, 0.9)), group(0, betas=(0.0, 0.0), verdict_momentum=0.5)):
        for size, dtype in ((3, torch.float32), (40, torch.bfloat16), (5, torch.float32), (1, torch.bfloat16)):
            p = nn.Parameter(torch.zeros(size, dtype=dtype, device=DEVICE))
            p.grad = torch.ones_like(p)
            views.append(FlatView(p, chosen, state, True))
    ballot = torch.zeros(1, 16, dtype=torch.uint8, device=DEVICE)
    length = lay_out(views)
    TritonKernel().cast(views, 0, length, "alternate", 0, 0, ballot)
    TritonKernel().apply(views, 0, length, ballot)
    TritonKernel().alone(views, "abstain", 0)
    assert launches == 4 * ["cast"] + 4 * ["apply"] + 4 * ["alone"]


CASES = [
    Case(2, (0.5, 0.25), "alternate", 0.5, 0.5, 1, "somewhere"),
    Case(2, (0.75, 0.25), "abstain", absent="everywhere"),
    Case(2, (0.0, 0.0), "positive", weight_decay=0.5),
]


def voted(table: list[Case]) -> Any:
    kernels.TritonKernel = TritonKernel  # type: ignore[attr-defined]
    return vote(table, 384, "TritonKernel", None, overlap=False)


@pytest.mark.nightly  # processes take long to start, and vote by the same kernel
@pytest.mark.skipif(not INTERPRETED, reason="test_cuda.py runs every case on the GPU")
def test_votes_of_real_processes() -> None:
    with fresh_workers(2) as workers:
        for trajectories in workers.run(2, voted, CASES):
            for case, trajectory in zip(CASES, trajectories, strict=True):
                assert_reference(case, trajectory)


@pytest.mark.skipif(not INTERPRETED, reason="test_cuda.py runs every case on the GPU")
def test_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "for_device", lambda device: TritonKernel())
    case = Case(1, (0.5, 0.25), "abstain", 0.5, 0.5, 1, "everywhere")
    assert_reference(case, alone([case])[0])
