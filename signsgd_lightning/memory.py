"""Tensors whose memory is not their value: none of them may be read or written through a pointer."""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from ._compat import is_functional, is_in_transform, is_zero_tensor

_ORDINARY = Tensor.__torch_dispatch__


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory holds its value.

    Example:
        >>> import torch
        >>> z = torch.complex(torch.zeros(2), torch.ones(2))
        >>> is_plain(z.imag), is_plain(z.conj().imag)  # the second has torch's negative bit
        (True, False)
    """
    return not (tensor.is_neg() or tensor.is_conj() or is_zero_tensor(tensor)) and _wrapper(tensor) is None


def plain(tensor: Tensor, name: str = "a tensor") -> Tensor:
    """Return a tensor whose memory holds its value: itself, or a copy where torch keeps a sign or zeros lazily.

    Args:
        tensor: dense.
        name: of the tensor, for the error.

    Raises:
        TypeError: if it stands for values that are elsewhere: sharded, replicated on a mesh, nested, traced.
    """
    check_memory(tensor, name)
    return resolved(tensor)


def resolved(tensor: Tensor) -> Tensor:
    """Return a tensor as `plain` does, of one that `check_memory` let pass."""
    return tensor.clone() if is_zero_tensor(tensor) else tensor.resolve_conj().resolve_neg()


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's memory in row-major order as uint8, a copy where it is not so already.

    Args:
        tensor: plain.
    """
    flat = tensor.detach().reshape(-1).contiguous()
    # Torch takes one element for contiguous with any stride, and views it by bytes only with a stride of 1.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def once(tensor: Tensor) -> Tensor:
    """Return a view of a tensor without the repetitions of `expand`, which share memory.

    Example:
        >>> import torch
        >>> once(torch.ones(3).expand(2, 3)).shape
        torch.Size([1, 3])
    """
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def find_shared(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return the names of two tensors that share memory, None where no two do.

    Example:
        >>> import torch
        >>> x = torch.ones(4)
        >>> find_shared({"a": x[:2], "b": x[2:]}), find_shared({"a": x[:2], "b": x[1:]})
        (None, ('a', 'b'))
    """
    there = {name: x for name, x in tensors.items() if x.numel() and not x.is_meta}
    ranges = sorted((x.data_ptr(), x.data_ptr() + _extent(x), name) for name, x in there.items())
    overlaps = ((a, b) for (_, end, a), (start, _, b) in itertools.pairwise(ranges) if start < end)
    return next(overlaps, None)


def check_memory(tensor: Tensor, name: str) -> None:
    """Make sure that a tensor has memory of its own.

    Raises:
        TypeError: if it stands for values that are elsewhere.
    """
    kind = _wrapper(tensor)
    if kind is not None:
        raise TypeError(
            f"{name} is a {kind}, whose values are not in its own memory, and Signum takes ordinary tensors and shards "
            "of DTensors: step outside of torch.func transforms and tracing"
        )


def _extent(tensor: Tensor) -> int:
    """Return how many bytes there are from a tensor's first entry to the end of its last."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * (1 + sum((size - 1) * stride for size, stride in strides))


def _wrapper(tensor: Tensor) -> str | None:
    """Return what kind of wrapper a tensor is, None for one with memory of its own."""
    if type(tensor).__torch_dispatch__ is not _ORDINARY:
        return type(tensor).__name__
    if tensor.is_nested:
        return "nested tensor"
    if is_functional(tensor) or is_in_transform(tensor):
        return "tensor of a function transform"
    return None
