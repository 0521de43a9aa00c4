"""What a device does best its own way: casting ballots, tallying them, applying a verdict.

One class a kind of device; `signsgd_core` judges each of them bit for bit.
"""

import functools
import warnings

import torch

from .build import load
from .cpu import NumpyKernel
from .device import DeviceKernel
from .native import NativeKernel
from .staged import Kernel

__all__ = ["DeviceKernel", "Kernel", "NativeKernel", "NumpyKernel", "for_device"]

DEVICE = DeviceKernel()


def for_device(device: torch.device) -> Kernel:
    """Return the kernel for a device: compiled loops on the CPU, Triton's on CUDA; without what they need, others."""
    if device.type == "cuda":
        return _cuda()
    return _cpu() if device.type == "cpu" else DEVICE


@functools.cache
def _cpu() -> Kernel:
    library = load()
    return NumpyKernel() if library is None else NativeKernel(library)


@functools.cache
def _cuda() -> Kernel:
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
        from .cuda import TritonKernel
    except Exception as error:  # not installed, no C compiler for its driver, or a device that it does not know
        warnings.warn(
            f"signsgd goes on with tensor operations, which are slower than its Triton kernels: install triton and a C "
            f"compiler as gcc, or name one in CC ({error!r})",
            stacklevel=2,
        )
        return DEVICE
    return TritonKernel()
