"""A tensor of a checkpoint that is known but not yet in memory: what the readers return and the writer takes."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Weight(NamedTuple):
    """One key of a state dict; `read` gathers its tensor (of `shape` and `dtype`) anew at each call.

    `slices` are the flat tensors, mapped from files, that hold its elements in order; empty where `read` computes them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    slices: tuple[torch.Tensor, ...] = ()


def zeros(name: str, shape: tuple[int, ...]) -> Weight:
    """A moment that no gradient has moved yet."""
    return Weight(name, shape, torch.float32, lambda: torch.zeros(shape))


def output_dtype(weight: Weight, requested: torch.dtype) -> torch.dtype:
    """The type a weight is written in: as requested, but integer buffers (batch-norm counters) stay as they are."""
    return requested if weight.dtype.is_floating_point else weight.dtype


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes: unlike with `torch.equal`, -0.0 and 0.0 differ, a NaN equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # Through numpy: torch compares bytes at a twentieth of the speed.
    return bool((as_bytes(left).numpy() == as_bytes(right).numpy()).all())


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, as a flat uint8 tensor; a view where the tensor is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
