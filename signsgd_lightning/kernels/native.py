"""CPU with a C compiler: the loops of native.c, each once over memory, all tensors in one call, on all threads."""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import signsgd_core as core
from signsgd_core import Zeros

from ..memory import is_plain
from ..views import FlatView, cover
from .cpu import NumpyKernel

_ABSTAIN = 2
_ALONE = 1 << 17
"""Coordinates that one thread takes before another is worth waking."""

_Tile = tuple[int, int, int, int, int, int, int, int]
"""Tile of native.c: how many coordinates, the bit of the first; addresses of g, m, x, u and settings, 0 for none."""


class _Cast(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("factor", "beta1", "rest1", "beta2", "rest2")] + [
        (name, ctypes.c_int32) for name in ("same_betas", "by_gradient", "zero", "half")
    ]


class _Move(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("lr", "decay", "gamma", "rest", "scale")]


class NativeKernel(NumpyKernel):
    """Loops over float32; gradients of other types pass through them in tiles, parameters of others go torch's way.

    Args:
        library: what `build.load` returned.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def displace(self, start: Tensor, end: Tensor) -> float:
        """Displace in one pass over memory; see `Kernel.displace`."""
        if not (_is_fast(start) and _is_fast(end)):
            return super().displace(start, end)
        return float(self._library.displace(start.data_ptr(), end.data_ptr(), end.numel()))

    def cast(
        self,
        views: Sequence[FlatView],
        lo: int,
        hi: int,
        zeros: Zeros,
        step: int,
        worker: int,
        out: Tensor,
    ) -> None:
        """Cast a ballot in one pass over memory; see `Kernel.cast`."""
        settings, tiles = _Settings(_zero(zeros, step, worker)), list[_Tile]()
        planes = _addresses(out)
        for view, a, b in cover(views, lo, hi):
            if not view.present:
                continue
            at, m, chosen = view.start - lo, view.momentum, settings.cast(view)
            if _is_row(view.raw_gradient):
                g = _address(view.raw_gradient, a)
                tiles.append((b - a, at + a, g, _address(m, a), 0, 0, chosen, 0))
            else:
                _share_out(self._library.cast, tiles, *planes)  # bits are written in order
                tiles = []
                for i in range(a, b, self.TILE):
                    values = view.flat_gradient[i : min(i + self.TILE, b)].float().contiguous()
                    tile = (len(values), at + i, values.data_ptr(), _address(m, i), 0, 0, chosen, 0)
                    _share_out(self._library.cast, [tile], *planes)
        _share_out(self._library.cast, tiles, *planes)

    def apply(self, views: Sequence[FlatView], lo: int, hi: int, verdict: Tensor) -> None:
        """Move the parameters in one pass over memory; see `Kernel.apply`."""
        settings, tiles = _Settings(), list[_Tile]()
        planes = _addresses(verdict)
        add = _Move(lr=-1.0, scale=1.0)  # 0 + V
        for view, a, b in cover(views, lo, hi):
            at = view.start - lo
            if _is_fast(view.parameter):
                x, u = _address(view.parameter, a), _address(view.verdict_momentum, a)
                tiles.append((b - a, at + a, 0, 0, x, u, 0, settings.move(view)))
                continue
            for i in range(a, b, self.TILE):
                v = torch.zeros(min(self.TILE, b - i), dtype=torch.float32, device=verdict.device)
                tile = (len(v), at + i, 0, 0, v.data_ptr(), 0, 0, ctypes.addressof(add))
                _share_out(self._library.apply, [tile], *planes)
                view.apply(i, i + len(v), v)
        _share_out(self._library.apply, tiles, *planes)

    def alone(self, views: Sequence[FlatView], zeros: Zeros, step: int) -> None:
        """Take all steps in one pass over memory; see `Kernel.alone`."""
        settings, tiles = _Settings(_zero(zeros, step, 0)), list[_Tile]()
        others, first = list[FlatView](), 0
        for view in views:
            p, gradient = view.parameter, view.raw_gradient
            n = p.numel()
            if not (_is_fast(p) and _is_row(gradient)):
                others.append(view)
            elif n:
                g, m, x, u = map(_address, (gradient, view.momentum, p, view.verdict_momentum))
                tiles.append((n, first, g, m, x, u, settings.cast(view), settings.move(view)))
                first += n
        _share_out(self._library.alone, tiles)
        super().alone(others, zeros, step)

    def verdict(self, ballots: Tensor, zeros: Zeros, step: int, masks: Tensor | None) -> Tensor:
        """Return the verdict on a shard counted in bit-sliced words; see `Kernel.verdict`."""
        out, words = torch.empty_like(ballots[0]), ballots.shape[-1] // 8
        masked = None if masks is None else masks.data_ptr()
        zero = _zero(zeros, step, 0)
        self._library.verdict(ballots.data_ptr(), masked, len(ballots), words, zero, out.data_ptr())
        return out


class _Settings:
    """What native.c reads of each parameter group, written once; to be kept until a call is done."""

    def __init__(self, zero: int = 0) -> None:
        self._zero = zero
        self._casts, self._moves = dict[tuple[int, bool], _Cast](), dict[tuple[int, float], _Move]()

    def cast(self, view: FlatView) -> int:
        """Return the address of the settings of steps 1 to 4."""
        group, key = view.group, (id(view.group), view.inverse_scale is None)
        if key not in self._casts:
            beta1, beta2 = group["betas"]
            m = view.momentum
            kinds = beta1 == beta2, view.by_gradient, self._zero, m is not None and m.dtype is torch.bfloat16
            self._casts[key] = _Cast(view.factor, beta1, 1 - beta1, beta2, 1 - beta2, *kinds)
        return ctypes.addressof(self._casts[key])

    def move(self, view: FlatView) -> int:
        """Return the address of the settings of steps 7 and 8."""
        group, key = view.group, (id(view.group), view.scale)
        if key not in self._moves:
            gamma = group["verdict_momentum"]
            self._moves[key] = _Move(float(group["lr"]), group["weight_decay"], gamma, 1 - gamma, view.scale)
        return ctypes.addressof(self._moves[key])


def _share_out(loop: Callable[..., None], tiles: list[_Tile], *planes: int | None) -> None:
    """Run one of native.c's loops on torch's number of threads, which share no byte of a ballot.

    Args:
        loop: runs without Python's lock.
        tiles: one behind the other.
        planes: addresses of the sign plane and the vote plane.
    """
    if not tiles:
        return
    table = np.array(tiles, np.int64)
    lo, hi = tiles[0][1], tiles[-1][1] + tiles[-1][0]
    threads = min(torch.get_num_threads(), (hi - lo) // _ALONE)
    if threads < 2:
        loop(table.ctypes.data, len(tiles), lo, hi, *planes)
        return
    cuts = [lo, *((lo + (hi - lo) * k // threads) // 64 * 64 for k in range(1, threads)), hi]
    jobs = [_pool(threads).submit(loop, table.ctypes.data, len(tiles), a, b, *planes) for a, b in pairwise(cuts)]
    for done in jobs:
        done.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "signsgd")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not come along


def _is_fast(values: Tensor) -> bool:
    return _is_row(values) and is_plain(values)


def _is_row(values: Tensor) -> bool:
    """Tell whether a plain tensor is one row of float32."""
    return values.dtype is torch.float32 and values.is_contiguous()


def _zero(zeros: Zeros, step: int, worker: int) -> int:
    bit = core.zero_bit(zeros, step, worker)
    return _ABSTAIN if bit is None else int(bit)


def _addresses(ballot: Tensor) -> tuple[int, int | None]:
    """Those of a ballot's sign plane and vote plane."""
    return ballot[0].data_ptr(), ballot[1].data_ptr() if len(ballot) == 2 else None


def _address(values: Tensor | None, index: int = 0) -> int:
    if values is None:
        return 0
    return values.data_ptr() + index * values.element_size() if index else values.data_ptr()
