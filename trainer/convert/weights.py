"""A tensor of a checkpoint that is known but not yet in memory: what the readers return and the writer takes."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trainer.convert.dtypes import INFINITY, ITEM_BYTES
from trainer.convert.safe_load import StoredTensor
from trainer.convert.stream import Extent, OpenFiles

if TYPE_CHECKING:
    import torch

ZEROS = Path("/dev/zero")  # as long as one likes, and zero at every place


class Weight(NamedTuple):
    """One key of a state dict; the bytes of `extents`, end to end, are its elements, of the type `dtype` names."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    extents: tuple[Extent, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def read(self) -> "torch.Tensor":
        """The tensor, read anew at each call.

        Raises:
            ConversionError: a file has become shorter.
        """
        import torch

        tensor = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        free = as_bytes(tensor).numpy().data
        with OpenFiles() as files:
            for path, start, stop in self.extents:
                files.read(path, start, free[: stop - start])
                free = free[stop - start :]
        return tensor


def whole(name: str, tensor: StoredTensor) -> Weight:
    """A tensor that a file of torch holds in one piece.

    Raises:
        ConversionError: it is not stored row after row.
    """
    return Weight(name, tensor.shape, tensor.dtype, (tensor.part(0, tensor.numel()),))


def zeros(name: str, shape: tuple[int, ...]) -> Weight:
    """A moment that no gradient has moved yet."""
    weight = Weight(name, shape, "float32", ())
    return weight._replace(extents=(Extent(ZEROS, 0, weight.num_bytes),))


def output_dtype(weight: Weight, requested: str) -> str:
    """The type a weight is written in: as requested, but integer buffers (batch-norm counters) stay as they are."""
    return requested if weight.dtype in INFINITY else weight.dtype


def same_bits(left: "torch.Tensor", right: "torch.Tensor") -> bool:
    """Whether two tensors hold the same bytes: unlike with `torch.equal`, -0.0 and 0.0 differ, a NaN equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # Through numpy: torch compares bytes at a twentieth of the speed.
    return bool((as_bytes(left).numpy() == as_bytes(right).numpy()).all())


def as_bytes(tensor: "torch.Tensor") -> "torch.Tensor":
    """The bytes of a tensor, as a flat uint8 tensor; a view where the tensor is contiguous."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
