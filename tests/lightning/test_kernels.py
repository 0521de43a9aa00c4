"""The compiled loops against NumPy and torch, bit for bit on arbitrary numbers: ranks may differ in what they have."""

import ctypes
import os
import platform
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import signsgd_core as core
from signsgd_lightning.kernels import DeviceKernel, Kernel, NativeKernel, NumpyKernel, build, native
from signsgd_lightning.views import FlatView, lay_out

ZEROS = ("alternate", "abstain", "positive")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (5, 0, 1, 64, 7, 1_000, 513, 3)
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -1e-40, 1.1754944e-38]
SETTINGS: list[dict[str, Any]] = [
    {"betas": (0.0, 0.0)},
    {"betas": (0.9, 0.9), "weight_decay": 0.1},
    {"betas": (0.9, 0.99), "maximize": True},
    {"betas": (0.0, 0.0), "verdict_momentum": 0.8, "weight_decay": 0.01},
    {"betas": (0.95, 0.98), "verdict_momentum": 0.7, "warmup_steps": 2},
    {"betas": (0.9, 0.9), "warmup_steps": 2},
    {"betas": (0.9, 0.9), "momentum_dtype": torch.bfloat16},
    {"betas": (0.95, 0.98), "momentum_dtype": torch.bfloat16, "verdict_momentum": 0.7, "warmup_steps": 2},
    {"betas": (0.9, 0.9), "orthogonalize": True, "matrices": 1, "verdict_momentum": 0.7, "weight_decay": 0.1},
]
KERNELS: list[Kernel] = [NumpyKernel(), DeviceKernel()]


@pytest.fixture(scope="module")
def compiled() -> Kernel:
    library = build.load()
    assert library is not None, "this machine has no C compiler, so the compiled loops were not tested"
    return NativeKernel(library)


@pytest.fixture(scope="module")
def without_avx() -> Kernel:
    """The loops as they are on processors without AVX, or with AVX-512."""
    if platform.machine() != "x86_64":
        pytest.skip("the loops of other processors are those that all tests take")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "cc -mno-avx")
        library = build.load.__wrapped__()
    assert library is not None
    return NativeKernel(library)


def group(step: int, **chosen: Any) -> dict[str, Any]:
    usual = {"weight_decay": 0.0, "verdict_momentum": 0.0, "warmup_steps": 0, "maximize": False, "orthogonalize": False}
    return {"lr": 0.0123, **usual, **chosen, "step": step}


def numbers(random: np.random.Generator, size: int, dtype: torch.dtype) -> Tensor:
    values = random.standard_normal(size) * 10.0 ** random.integers(-6, 6, size)
    special = random.random(size) < 0.1
    values[special] = random.choice(SPECIAL, special.sum())
    return torch.from_numpy(values).to(dtype)


def finite(random: np.random.Generator, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(random.standard_normal(size)).to(dtype)


def views_of(
    seed: int, dtype: torch.dtype, settings: dict[str, Any], scale: float | None, step: int, device: str = "cpu"
) -> Any:
    """Some views, with momenta of earlier steps, of which one has no gradient and one lies oddly in memory."""
    random, state, views = np.random.default_rng(seed), defaultdict[Tensor, dict[str, Tensor]](dict), []
    for k, size in enumerate(SIZES):
        p = nn.Parameter(finite(random, size, dtype).to(device))
        if k == 5:
            p = nn.Parameter(p.detach().view(20, 50).t())
        p.grad = numbers(random, size, dtype).to(device).view_as(p)
        if k == 6:
            p.grad = numbers(random, 2 * size, dtype).to(device)[::2]
        for name in ("momentum", "verdict_momentum"):
            kept = settings.get("momentum_dtype") if name == "momentum" else None
            state[p][name] = finite(random, size, kept or torch.float32).to(device).view_as(p).contiguous()
        inverse = None if scale is None else torch.tensor(scale, device=device)
        matrix = torch.Size((1, size)) if settings.get("orthogonalize") else None  # one row, which scales step 8
        views.append(FlatView(p, group(step, **settings), state, k != 3, inverse, shape=matrix))
    lay_out(views)
    return views, state


def bits(values: Tensor) -> bytes:
    values = values.detach().cpu().reshape(-1)
    return (values.view(torch.int16) if values.dtype is torch.bfloat16 else values).numpy().tobytes()


def outcome(views: list[FlatView], state: Any) -> list[bytes]:
    return [bits(p) for s in views for p in (s.parameter, *state[s.parameter].values())]


@torch.no_grad()
def one_step(kernel: Kernel, views: list[FlatView], zeros: core.Zeros, step: int, first: int) -> bytes:
    """Cast all from coordinate `first` on in one go and apply the ballot as the verdict; return the ballot."""
    length, device = views[-1].stop, views[0].parameter.device
    ballot = torch.zeros(core.planes(zeros), -(-(length - first) // 8), dtype=torch.uint8, device=device)
    kernel.cast(views, first, length, zeros, step, 1, ballot)
    absent = [s for s in views if not s.present]
    mask = np.ones(8 * ballot.shape[1], bool)
    for s in absent:
        mask[max(s.start - first, 0) : max(s.stop - first, 0)] = False
    ballot &= torch.from_numpy(np.packbits(mask, bitorder="little")).to(device)  # what the teller would not look at
    kernel.apply(views, first, length, ballot)
    for s in views:
        s.finish()
    return bits(ballot)


@pytest.mark.parametrize(("zeros", "scale"), [("alternate", None), ("abstain", 0.37), ("positive", 3.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_a_voted_step(chosen: dict[str, Any], dtype: torch.dtype, zeros: Any, scale: Any, compiled: Kernel) -> None:
    for step, first in ((1, 0), (4, 16)):
        outcomes = []
        for kernel in (compiled, *KERNELS):
            views, state = views_of(step, dtype, chosen, scale, step)
            ballot = one_step(kernel, views, zeros, step, first)
            outcomes.append([ballot, *outcome(views, state)])
        assert outcomes[0] == outcomes[1]
        assert outcomes[0] == outcomes[2]


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_a_voted_step_without_avx(chosen: dict[str, Any], zeros: Any, without_avx: Kernel) -> None:
    outcomes = []
    for kernel in (without_avx, NumpyKernel()):
        views, state = views_of(1, torch.float32, chosen, None, 1)
        outcomes.append([one_step(kernel, views, zeros, 1, 0), *outcome(views, state)])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_a_step_alone(chosen: dict[str, Any], dtype: torch.dtype, zeros: Any, compiled: Kernel) -> None:
    for step in (1, 4):
        outcomes = []
        for kernel in (compiled, *KERNELS):
            views, state = views_of(step, dtype, chosen, 0.37, step)
            with torch.no_grad():
                kernel.alone(views, zeros, step)
                for s in views:
                    s.finish()
            outcomes.append(outcome(views, state))
        assert outcomes[0] == outcomes[1]
        assert outcomes[0] == outcomes[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 1_003])
def test_displace(length: int, dtype: torch.dtype, compiled: Kernel) -> None:
    """``x − p`` over `p`, and the sum of what is finite of it."""
    random = np.random.default_rng(length)
    x, p = random.integers(-64, 64, (2, length)) / 8
    p[random.random(length) < 0.1] = random.choice([np.nan, np.inf, -np.inf])
    for kernel in (compiled, *KERNELS):
        start, end = torch.tensor(x, dtype=dtype), torch.tensor(p, dtype=dtype)
        total = kernel.displace(start, end)
        np.testing.assert_array_equal(end.numpy(), x - p)
        assert total == np.abs(np.where(np.isfinite(x - p), x - p, 0)).sum()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=40), st.integers(1, 70), st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=40)
def test_verdicts(words: list[int], workers: int, step: int, data: st.DataObject) -> None:
    library = build.load()
    assert library is not None
    zeros, masked = data.draw(st.sampled_from(ZEROS)), data.draw(st.booleans())
    length = data.draw(st.sampled_from([1, 2, 127, 128, 300]))
    shape = (workers, core.planes(zeros), length)  # type: ignore[arg-type]
    random = np.random.default_rng(words)
    ballots = random.integers(0, 2**64, shape, dtype=np.uint64) & random.choice(np.array(words, np.uint64), shape)
    masks = random.choice(np.array(words, np.uint64), (workers, length)) if masked else None
    args = (zeros, step, None if masks is None else torch.from_numpy(masks.view(np.uint8)))
    ours, theirs = (
        kernel.verdict(torch.from_numpy(ballots.view(np.uint8)), *args)  # type: ignore[arg-type]
        for kernel in (NativeKernel(library), NumpyKernel())
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 8, 15, 16, 64])
def test_all_of_one_mind(workers: int, compiled: Kernel) -> None:
    """The largest count there is: of a power of two it has a bit more."""
    for byte in (0, 255):
        ballots = torch.full((workers, 1, 16), byte, dtype=torch.uint8)
        for kernel in (compiled, *KERNELS):
            assert set(kernel.verdict(ballots, "alternate", 0, None).flatten().tolist()) == {byte}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", range(8))
def test_threads_share_no_byte(
    first: int, dtype: torch.dtype | None, compiled: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_ALONE", 100)
    outcomes = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        random = np.random.default_rng(first)
        p, q = nn.Parameter(torch.zeros(first)), nn.Parameter(finite(random, 5_003, torch.float32))
        p.grad, q.grad = torch.ones(first), numbers(random, 5_003, torch.float32)
        state = defaultdict[Tensor, dict[str, Tensor]](dict)
        chosen = group(0, betas=(0.9, 0.99), verdict_momentum=0.5, momentum_dtype=dtype)
        views = [FlatView(p, chosen, state, True), FlatView(q, chosen, state, True)]
        lay_out(views)
        ballot = one_step(compiled, views, "abstain", 0, 0)
        outcomes.append([ballot, *outcome(views, state)])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.9, 0.99)])
@pytest.mark.parametrize("kernel", [None, *KERNELS], ids=lambda kernel: type(kernel).__name__)
def test_a_narrow_momentum_is_rounded_once_and_the_ballot_never(kernel: Any, betas: Any, compiled: Kernel) -> None:
    random = np.random.default_rng(0)
    p, state = nn.Parameter(torch.zeros(5_000)), defaultdict[Tensor, dict[str, Tensor]](dict)
    state[p]["momentum"] = finite(random, 5_000, torch.bfloat16)
    m, g = state[p]["momentum"].float().numpy(), finite(random, 5_000, torch.float32).numpy()
    g[::2] = -m[::2] * np.float32(betas[0]) / np.float32(1 - betas[0])  # so that c is all but zero
    p.grad = torch.from_numpy(g)
    chosen = group(0, betas=betas, momentum_dtype=torch.bfloat16)
    ballot = one_step(kernel or compiled, [FlatView(p, chosen, state, True)], "abstain", 0, 0)
    assert ballot == core.pack(core.direction(m, g, betas[0])).tobytes()
    expected = core.update_momentum(m, g, betas[1]).astype(ml_dtypes.bfloat16)
    assert bits(state[p]["momentum"]) == expected.tobytes()


SCRIPT = """
import warnings, torch
from signsgd_lightning import kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    kernel = kernels.for_device(torch.device("cpu"))
print(type(kernel).__name__, *[str(w.message) for w in caught])
"""


def _kernel(cache: Path, **environment: str) -> str:
    settings = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=settings, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.multiprocess
def test_without_a_compiler_numpy_goes_on(tmp_path: Path) -> None:
    said = _kernel(tmp_path, CC="there-is-no-such-compiler")
    assert said.startswith("NumpyKernel signsgd could not compile its loops and goes on with NumPy's")
    assert "there-is-no-such-compiler" in said


@pytest.mark.nightly
@pytest.mark.multiprocess
def test_it_is_compiled_once_and_anew_with_other_options(tmp_path: Path) -> None:
    assert _kernel(tmp_path, CC="cc") == "NativeKernel\n"
    (made,) = (tmp_path / "signsgd").iterdir()
    when = made.stat().st_mtime_ns
    assert _kernel(tmp_path, CC="cc") == "NativeKernel\n"
    assert made.stat().st_mtime_ns == when
    ctypes.CDLL(str(made))
    assert _kernel(tmp_path, CC="cc -g") == "NativeKernel\n"
    assert len(list((tmp_path / "signsgd").iterdir())) == 2
    assert made.stat().st_mtime_ns == when


@pytest.mark.nightly
@pytest.mark.multiprocess
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "signsgd").write_text("a file in its place")
    assert _kernel(tmp_path).startswith("NumpyKernel signsgd could not compile")


def test_views_of_one_group_may_differ_in_their_scale(compiled: Kernel) -> None:
    """As parameters that a sharded model averages, and unscales, beside those that it shards."""
    outcomes = []
    for kernel in (NumpyKernel(), compiled):
        views, state = views_of(1, torch.float32, {"betas": (0.9, 0.99)}, 1 / 64, 2)
        views = [
            replace(v, group=views[0].group, inverse_scale=(v.inverse_scale, None)[k % 2]) for k, v in enumerate(views)
        ]
        outcomes.append((one_step(kernel, views, "alternate", 2, 0), outcome(views, state)))
    assert outcomes[0] == outcomes[1]
