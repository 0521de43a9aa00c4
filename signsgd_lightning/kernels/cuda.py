"""CUDA: the loops of triton_loops.py, one launch for all tensors of one dtype in one parameter group."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

import signsgd_core as core
from signsgd_core import Zeros

from ..memory import is_plain
from ..views import FlatView, cover
from . import triton_loops as loops
from . import triton_tally as tally
from .device import DeviceKernel

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Without fusion: a fused multiply-add rounds once where NumPy and torch round twice."""

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_BLOCK: int = loops.BLOCK.value
_KEPT = 1024
"""How many tables of each kind stay on the device for the next step: a vote's has one a bucket, group and dtype."""

_Tile = tuple[int, ...]
"""Those of triton_loops.py."""


class TritonKernel(DeviceKernel):
    """Loops over float32, bfloat16 and float16; gradients of other types are converted, parameters go torch's way.

    Nothing waits for the device: a gradient scaler's factor is read there.
    """

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
        words = _words(out)
        batches = dict[Any, _Batch]()
        for view, a, b in cover(views, lo, hi):
            if view.present:
                g = _gradient(view)
                batch = batches.setdefault((id(view.group), view.inverse_scale is None, g.dtype), _Batch(view))
                batch.add((g, view.momentum, None, None), view.start - lo, a, b)
        for batch in batches.values():
            settings = {**_casting(batch.view), "G": _TYPES[batch.dtype(0)], "ZERO": _zero(zeros, step, worker)}
            batch.launch(loops.cast, signs=words[0], votes=_votes(words), **settings)
        if words.data_ptr() != out.data_ptr():
            out.copy_(words.view(torch.uint8)[:, : out.shape[1]])

    def apply(self, views: Sequence[FlatView], lo: int, hi: int, verdict: Tensor) -> None:
        """Move the parameters in one pass over memory; see `Kernel.apply`."""
        words = _words(verdict)
        batches = dict[Any, _Batch]()
        for view, a, b in cover(views, lo, hi):
            at = view.start - lo
            if _is_fast(view.x):
                batch = batches.setdefault((id(view.group), view.scale, view.x.dtype), _Batch(view))
                batch.add((None, None, view.x, view.verdict_momentum), at, a, b)
            else:
                byte, skipped = divmod(at + a, 8)
                view.apply(a, b, self.unpack(verdict[:, byte:], skipped + b - a)[skipped:])
        for batch in batches.values():
            settings = {**_moving(batch.view), "X": _TYPES[batch.dtype(2)], "words": words.shape[1]}
            batch.launch(loops.apply, signs=words[0], votes=_votes(words), **settings)

    def alone(self, views: Sequence[FlatView], zeros: Zeros, step: int) -> None:
        """Take all steps in one pass over memory; see `Kernel.alone`."""
        batches, others = dict[Any, _Batch](), list[FlatView]()
        for view in views:
            if not _is_fast(view.x):
                others.append(view)
                continue
            x, g = view.x, _gradient(view)
            batch = batches.setdefault((id(view.group), view.scale, x.device, x.dtype, g.dtype), _Batch(view))
            batch.add((g, view.momentum, x, view.verdict_momentum), 0, 0, x.numel())
        for batch in batches.values():
            settings = {**_casting(batch.view), **_moving(batch.view), "ZERO": _zero(zeros, step, 0)}
            batch.launch(loops.alone, **settings, G=_TYPES[batch.dtype(0)], X=_TYPES[batch.dtype(2)])
        super().alone(others, zeros, step)

    def verdict(self, ballots: Tensor, zeros: Zeros, step: int, masks: Tensor | None) -> Tensor:
        """Return the verdict on a shard counted in bit-sliced words; see `Kernel.verdict`."""
        out = torch.empty_like(ballots[0], memory_format=torch.contiguous_format)
        workers, words = len(ballots), out.shape[-1] // 4
        given = ballots.contiguous().view(torch.uint32)
        votes = None if masks is None else masks.contiguous().view(torch.uint32)
        if words:
            settings = {"PLANES": workers.bit_length(), "ZERO": _zero(zeros, step, 0)}
            to = out.view(torch.uint32)
            _launch(
                tally.verdict, -(-words // tally.BLOCK.value), out.device, given, votes, to, workers, words, **settings
            )
        return out


@dataclass
class _Batch:
    """What one launch takes; its first view has the settings of all."""

    view: FlatView
    tensors: list[tuple[Tensor | None, ...]] = field(default_factory=list)
    tiles: list[_Tile] = field(default_factory=list)

    def add(self, tensors: tuple[Tensor | None, ...], first: int, a: int, b: int) -> None:
        """Add coordinates [a, b) of one tensor, its g, m, x and u; bit `first` is that of coordinate 0."""
        if a < b:
            self.tensors.append(tensors)  # copies among them must live until the launch
            self.tiles.append((*(0 if t is None else t.data_ptr() for t in tensors), first, a, b))

    def dtype(self, column: int) -> torch.dtype:
        """Return that of g, m, x or u."""
        tensor = self.tensors[0][column] if self.tensors else None
        return torch.float32 if tensor is None else tensor.dtype

    def launch(self, loop: Any, **settings: Any) -> None:
        if not self.tiles:
            return
        device = self.view.parameter.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        tiles = _table(tuple(self.tiles), device, stream)
        programs = _programs(tuple(tile[-2:] for tile in self.tiles), device, stream)
        aligned = not any(address % 16 for tile in self.tiles for address in tile[:4])
        _launch(loop, len(programs), device, tiles, programs, ALIGNED=aligned, **settings)


@functools.lru_cache(_KEPT)
def _table(tiles: tuple[_Tile, ...], device: torch.device, stream: int) -> Tensor:
    return _to(np.array(tiles, np.int64), device)


@functools.lru_cache(_KEPT)
def _programs(spans: tuple[tuple[int, int], ...], device: torch.device, stream: int) -> Tensor:
    """Return which blocks of which tiles there are, a row each: they stay when a gradient gets other memory."""
    lo, hi = np.array(spans, np.int64).T
    first, count = lo // _BLOCK, -(-hi // _BLOCK) - lo // _BLOCK
    tile = np.repeat(np.arange(len(spans)), count)
    block = np.arange(len(tile)) - (np.cumsum(count) - count - first)[tile]
    return _to(np.stack([tile, block], 1).astype(np.int32), device)


def _to(table: Any, device: torch.device) -> Tensor:
    """Copy a table to the device without waiting; only its stream may read it, which is why caches ask for one."""
    there = torch.from_numpy(table)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there


def _launch(loop: Any, programs: int, device: torch.device, *args: Any, **settings: Any) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        loop[(programs,)](*args, **settings, **OPTIONS)


def _casting(view: FlatView) -> dict[str, Any]:
    """Return the settings of steps 1 to 4."""
    (beta1, beta2), m, scale = view.group["betas"], view.momentum, view.inverse_scale
    return {
        "scale": None if scale is None else scale.to(view.parameter.device, torch.float32),
        "beta1": float(beta1),
        "rest1": 1.0 - beta1,
        "beta2": float(beta2),
        "rest2": 1.0 - beta2,
        "M": None if m is None else _TYPES[m.dtype],
        "SAME": beta1 == beta2,
        "BY_GRADIENT": view.by_gradient,
        "DOWN": not view.group["maximize"],
    }


def _moving(view: FlatView) -> dict[str, Any]:
    """Return the settings of steps 7 and 8."""
    lr, decay, gamma = (float(view.group[name]) for name in ("lr", "weight_decay", "verdict_momentum"))
    numbers = {"lr": lr, "decay": decay, "gamma": gamma, "rest": 1.0 - gamma, "u_scale": view.scale}
    return {**numbers, "AVERAGED": view.verdict_momentum is not None, "DECAYED": decay != 0.0}


def _gradient(view: FlatView) -> Tensor:
    gradient = view.flat_gradient
    return (gradient if gradient.dtype in _TYPES else gradient.float()).contiguous()


def _is_fast(x: Tensor) -> bool:
    return x.dtype in _TYPES and x.is_contiguous() and is_plain(x)


def _words(ballot: Tensor) -> Tensor:
    """Return a ballot in words of 32 bits: its own memory where that has whole ones."""
    if ballot.shape[1] % 4 or ballot.data_ptr() % 4 or not ballot.is_contiguous():
        ballot = torch.nn.functional.pad(ballot, (0, -ballot.shape[1] % 4)).clone(memory_format=torch.contiguous_format)
    return ballot.view(torch.uint32)


def _votes(words: Tensor) -> Tensor | None:
    return words[1] if len(words) == 2 else None


def _zero(zeros: Zeros, step: int, worker: int) -> int:
    bit = core.zero_bit(zeros, step, worker)
    return int(loops.ABSTAIN.value) if bit is None else int(bit)
