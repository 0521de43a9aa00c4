"""Tensors whose memory is not their value: none of them may be read or written through a pointer."""

import torch
from torch import Tensor


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory holds its value.

    Example:
        >>> z = torch.complex(torch.zeros(2), torch.ones(2))
        >>> is_plain(z.imag), is_plain(z.conj().imag)  # the second has torch's negative bit
        (True, False)
    """
    return not (tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()) and _wrapper(tensor) is None


def plain(tensor: Tensor, name: str = "a tensor") -> Tensor:
    """Return a tensor whose memory holds its value: itself, or a copy where torch keeps a sign or zeros lazily.

    Args:
        tensor: dense.
        name: of the tensor, for the error.

    Raises:
        TypeError: if it stands for values that are elsewhere: sharded, replicated on a mesh, nested, traced.
    """
    check_memory(tensor, name)
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.resolve_conj().resolve_neg()


def check_memory(tensor: Tensor, name: str) -> None:
    """Make sure that a tensor has memory of its own.

    Raises:
        TypeError: if it stands for values that are elsewhere.
    """
    kind = _wrapper(tensor)
    if kind is not None:
        raise TypeError(
            f"{name} is a {kind}, whose values are not in its own memory, and Signum takes ordinary tensors alone: "
            "leave models unsharded and replicate them by DistributedDataParallel (in Lightning: "
            "strategy='majority_vote'), and step outside of torch.func transforms and tracing"
        )


def _wrapper(tensor: Tensor) -> str | None:
    """Return what kind of wrapper a tensor is, None for one with memory of its own."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return type(tensor).__name__
    if tensor.is_nested:
        return "nested tensor"
    if torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "tensor of a function transform"
    return None
