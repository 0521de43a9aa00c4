"""Step 2b: the polar factors of a worker's directions in the gradients' place, matrices of one shape in one product."""

from collections import defaultdict
from collections.abc import Iterable, MutableSequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from signsgd_core.polar import NEGLIGIBLE

from .views import FlatView


def orthogonalize(views: MutableSequence[FlatView], numbers: Iterable[int]) -> None:
    """Replace views whose group says so by ones whose gradient is the polar factor of their direction: steps 1-3, 2b.

    The new ones have no momentum and vote by the sign of that gradient. This step's gradients are in the momenta of the
    old ones then.

    Args:
        views: of whole parameters.
        numbers: of the views to look at; those without a gradient, and those that were replaced before, stay.
    """
    alike = defaultdict[tuple[Any, ...], list[int]](list)
    for k in numbers:
        view = views[k]
        if view.present and view.group["orthogonalize"] and not view.orthogonal:
            alike[id(view.group), view.matrices, view.parameter.device].append(k)
    for same in alike.values():
        first = views[same[0]]
        group = {**first.group, "betas": (0.0, 0.0), "maximize": False}
        directions = [views[k].directions(0, views[k].parameter.numel()).view(first.matrices) for k in same]
        factors = polar(torch.cat(directions), first.group["ns_steps"], first.group["ns_coefficients"])
        for k, factor in zip(same, torch.split(factors, [len(c) for c in directions]), strict=True):
            views[k] = replace(views[k], group=group, inverse_scale=None, sent=factor, orthogonal=True)


def polar(c: Tensor, ns_steps: int, ns_coefficients: tuple[float, float, float]) -> Tensor:
    r"""Return the polar factors of matrices by Newton–Schulz, as `signsgd_core.polar` does to rounding.

    .. math::
        X = C / ‖C‖_F, \quad A = X X^⊤, \quad X ← a X + (b A + c A^2) X

    In bfloat16 on CUDA, as `torch.optim.Muon` does everywhere, and in float32 on other devices.

    Args:
        c: finite, float32 of shape (matrices, rows, columns).
        ns_steps: iterations.
        ns_coefficients: a, b, c of each.

    Returns:
        float32 of the same shape.
    """
    if c.numel() == 0:
        return c
    x = _divided(c, c.abs().amax((1, 2), keepdim=True))  # first by the largest: squares neither overflow nor vanish
    x = _divided(x, torch.linalg.matrix_norm(x, keepdim=True))
    x = hardshrink(x, NEGLIGIBLE)
    tall = c.shape[1] > c.shape[2]
    x = x.mT if tall else x
    x = x.bfloat16() if c.device.type == "cuda" else x
    a, b, c5 = ns_coefficients
    for _ in range(ns_steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c5), x, beta=a)
    return (x.mT if tall else x).float().contiguous()


def _divided(c: Tensor, norm: Tensor) -> Tensor:
    return c / norm.masked_fill(norm == 0, 1.0)  # zeros stay zeros
