"""The Triton kernels: their loops in the interpreter or on a GPU, and what a GPU would be given to run."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import signsgd_core as core

from .test_kernels import SETTINGS, one_step, views_of

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux only)")

CHECKS = Path(__file__).with_name("triton_checks.py")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("interpret", "which"),
    [
        ("1", "not nightly"),
        pytest.param("1", "nightly", marks=pytest.mark.nightly),
        pytest.param("0", "nightly or not nightly", marks=[pytest.mark.cuda, GPU]),
    ],
)
def test_equal_to_numpy(interpret: str, which: str) -> None:
    """In a process of its own: whether loops are interpreted is settled when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", which, str(CHECKS)]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout


class _Described:
    """A GPU that is not there: what Triton asks of one in order to compile for it."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # type: ignore[no-any-return]  # a cache of its own for each

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Any]]:
    """What the kernel would launch for one step, compiled for an architecture by Triton's own compiler."""
    from triton.runtime import driver

    from signsgd_lightning.kernels import cuda

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: dict[int, Any] = {}

    def compile_it(loop: Any, programs: int, device: torch.device, *args: Any, **settings: Any) -> None:
        kernel = loop.warmup(*args, **settings, **cuda.OPTIONS, grid=(programs,))
        found[id(kernel)] = kernel

    @torch.no_grad()
    def of(architecture: int, chosen: dict[str, Any], dtype: torch.dtype, zeros: core.Zeros) -> list[Any]:
        monkeypatch.setattr(driver, "_active", _Described(architecture))
        monkeypatch.setattr(cuda, "_launch", compile_it)
        views, _ = views_of(1, dtype, chosen, 0.37, 1)
        kernel = cuda.TritonKernel()
        one_step(kernel, views, zeros, 1, 0)
        kernel.alone(views, zeros, 1)
        kernel.verdict(torch.zeros(3, core.planes(zeros), 64, dtype=torch.uint8), zeros, 1, None)
        return list(found.values())

    return of


@pytest.mark.parametrize(
    ("architecture", "chosen", "dtype", "zeros"),
    [
        (90, SETTINGS[4], torch.float32, "abstain"),
        pytest.param(80, SETTINGS[1], torch.bfloat16, "alternate", marks=pytest.mark.nightly),
        pytest.param(100, SETTINGS[6], torch.float16, "positive", marks=pytest.mark.nightly),
        pytest.param(90, SETTINGS[0], torch.float32, "alternate", marks=pytest.mark.nightly),
        pytest.param(90, SETTINGS[3], torch.float16, "abstain", marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_compiled_for_a_gpu(compiled: Any, architecture: int, chosen: Any, dtype: torch.dtype, zeros: Any) -> None:
    kernels = compiled(architecture, chosen, dtype, zeros)
    assert {kernel.metadata.name for kernel in kernels} == {"cast", "apply", "alone", "verdict"}
    for kernel in kernels:
        machine = kernel.asm["sass"]
        assert "FADD" in machine or kernel.metadata.name in ("cast", "verdict")
        assert not re.search(r"\b[FD]FMA\b", machine), "a fused multiply-add rounds once where NumPy rounds twice"
        assert ".FTZ" not in machine, "subnormal numbers must not become 0"
        assert "LDG.E.128" in machine, "memory must be read in whole vectors"
