"""Loads a file of torch without torch, without DeepSpeed and without running anything that is pickled in it.

The format (torch/csrc/jit/serialization/, as of torch 2.13): a zip archive of members that are stored as they are,
`NAME/data.pkl` with the structure, and one `NAME/data/N` for the bytes of each tensor storage.
"""

import math
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trainer.convert.archive import SIGNATURE, Record, read_records
from trainer.convert.dtypes import ITEM_BYTES
from trainer.convert.errors import ConversionError
from trainer.convert.pickles import Buildable, Named, PickleError, UnknownName, read_pickle
from trainer.convert.stream import Extent

MAX_PICKLE_BYTES = 1 << 28
NUMBERS = {"float64": "=d", "float32": "=f", "int64": "=q", "int32": "=i"}


class Storage(NamedTuple):
    """The bytes that tensors lie in, and the type of their elements; None where each tensor tells."""

    extent: Extent
    dtype: str | None


class StoredTensor(NamedTuple):
    """A tensor that has not been read. `extent` is None if its elements do not lie side by side, row after row."""

    shape: tuple[int, ...]
    dtype: str
    extent: Extent | None

    def numel(self) -> int:
        return math.prod(self.shape)

    def part(self, start: int, stop: int) -> Extent:
        """Where the elements `start` to `stop` lie, counted row after row.

        Raises:
            ConversionError: they do not lie side by side.
        """
        if self.extent is None:
            raise ConversionError(
                f"a tensor of shape {list(self.shape)} is not stored row after row, and cannot be copied; "
                "save the checkpoint with contiguous tensors."
            )
        first, size = self.extent.start, ITEM_BYTES[self.dtype]
        return self.extent._replace(start=first + start * size, stop=first + stop * size)

    def item(self) -> float:
        """The value of a tensor of one element, read."""
        if self.numel() != 1 or self.dtype not in NUMBERS:
            raise ConversionError(f"a tensor of shape {list(self.shape)} and type {self.dtype} is not a number.")
        path, start, stop = self.part(0, 1)
        with path.open("rb") as file:
            file.seek(start)
            return float(struct.unpack(NUMBERS[self.dtype], file.read(stop - start))[0])


class FragmentAddress(Buildable):
    """Stand-in for DeepSpeed's class of this name: where one parameter's share lies in a rank's flat partition."""

    numel = 0
    start = 0

    def build(self, state: object) -> None:
        if type(state) is not dict or not _are_counts(state.get("numel"), state.get("start")):
            raise ValueError("a fragment_address without numel and start")
        self.numel, self.start = state["numel"], state["start"]


class Ignored(Buildable):
    """Stand-in for what a conversion does not look at."""

    def __init__(self, *_: object) -> None:
        pass


def safe_load(path: Path) -> dict[str, Any]:
    """The dict saved in `path`, whose tensors are `StoredTensor`: no more than its structure is read.

    Raises:
        ConversionError: the file is unreadable, not a dict, or refers to a class or function outside `NAMES`.
    """
    records = {record.name: record for record in read_records(path)}
    try:
        _check_archive(path, len(records))
        folder = _folder(records)
        if _content(path, records, f"{folder}/byteorder").decode() not in ("", sys.byteorder):
            raise PickleError(f"its bytes are in another order than this machine's ({sys.byteorder} endian)")
        storages = partial(_storage, path, records, folder)
        state = read_pickle(_content(path, records, f"{folder}/data.pkl"), NAMES, storages)
    except UnknownName as error:
        raise ConversionError(
            f"{path}: refers to {error}, which no ZeRO checkpoint needs and which could run code; "
            "nothing was run. Convert only checkpoints of DeepSpeed 0.19 that you know the origin of."
        ) from error
    except (PickleError, ValueError, OSError) as error:
        raise ConversionError(
            f"{path}: damaged, or not written by torch ({error}); copy the checkpoint again or take another one."
        ) from error
    if not isinstance(state, dict):
        raise ConversionError(
            f"{path}: holds a {type(state).__name__}, not a dict; this is not a DeepSpeed checkpoint."
        )
    return state


def _check_archive(path: Path, num_records: int) -> None:
    """Make sure that torch would read the same members: it knows archives by their first bytes, and compressed ones."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        file.seek(0)
        if file.read(len(SIGNATURE)) != SIGNATURE or len(archive.infolist()) != num_records:
            raise PickleError("bytes before the archive, or compressed members")


def read_count(value: Any) -> int:
    """A count that was saved as a number or as a tensor of one element."""
    return int(value.item() if isinstance(value, StoredTensor) else value)


def _folder(records: Mapping[str, Record]) -> str:
    """The one folder of an archive of torch."""
    found = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise PickleError(f"{len(found)} members named data.pkl")
    return found[0]


def _content(path: Path, records: Mapping[str, Record], name: str) -> bytes:
    """The bytes of a small member; none if it is missing (`byteorder` is, before torch 2.1)."""
    if name not in records:
        return b""
    _, start, stop, _ = records[name]
    if stop - start > MAX_PICKLE_BYTES:
        raise PickleError(f"{name} of {stop - start:,} bytes")
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _storage(path: Path, records: Mapping[str, Record], folder: str, address: Any) -> Storage:
    """What torch saves for a storage: ("storage", its class, the number of its member, a device, its elements)."""
    kind, storage_class, key, _, numel = address
    if kind != "storage" or type(storage_class) is not Named or type(key) is not str or not _are_counts(numel):
        raise ValueError("a storage that torch does not write")
    dtype = STORAGES[storage_class.name]
    record = records[f"{folder}/data/{key}"]
    if record.stop - record.start != numel * ITEM_BYTES[dtype or "uint8"]:
        raise ValueError(f"{record.name} has {record.stop - record.start} bytes for {numel} elements of {dtype}")
    return Storage(Extent(path, record.start, record.stop), dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> StoredTensor:
    """A tensor of the elements `offset`, ... of a storage; `rest` holds its type under `_rebuild_tensor_v3` only."""
    typed = [value.name.removeprefix("torch.") for value in rest if type(value) is Named]
    if type(storage) is not Storage or not _are_counts(offset, *size, *stride):
        raise ValueError("a tensor that torch does not write")
    dtype = typed[0] if typed else storage.dtype
    if dtype is None:
        raise ValueError("a tensor without a type")
    item, (path, start, stop) = ITEM_BYTES[dtype], storage.extent
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else offset - 1
    if item * (last + 1) > stop - start:
        raise ValueError(f"a tensor of {numel} elements from {offset} on leaves its storage of {stop - start} bytes")
    first = start + offset * item
    extent = Extent(path, first, first + numel * item) if _is_contiguous(size, stride) else None
    return StoredTensor(tuple(size), dtype, extent)


def _is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        if n == 0:
            return True
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _parameter(tensor: Any, *_: object) -> StoredTensor:
    if type(tensor) is not StoredTensor:
        raise ValueError("a parameter that torch does not write")
    return tensor


def _of_type(rebuild: Any, _: object, arguments: Any, *__: object) -> Any:
    """A tensor that has attributes besides, which are left out."""
    if type(rebuild) is not Named or rebuild.make not in (_tensor, _parameter):
        raise ValueError("a tensor of a class that torch does not write")
    return rebuild.make(*arguments)


def _size(numbers: Any) -> tuple[int, ...]:
    if not _are_counts(*numbers):
        raise ValueError("a torch.Size of something else than numbers")
    return tuple(numbers)


def _ordered_dict() -> dict[Any, Any]:
    """Its items follow one by one; items given at once, as Python 2 did, could have keys of any kind."""
    return {}


def _are_counts(*values: object) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


STORAGES = {
    "torch.DoubleStorage": "float64", "torch.FloatStorage": "float32", "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16", "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64", "torch.LongStorage": "int64", "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16", "torch.CharStorage": "int8", "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool", "torch.storage.UntypedStorage": None,
}  # fmt: skip
STAND_INS: dict[str, Callable[..., Any]] = {
    # Everything beyond tensors and plain containers that ZeRO-1, 2 and 3 save with DeepSpeed 0.19.8.
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Ignored,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Ignored,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Ignored,
    # Python 3.11 up to 3.11.3 pickles an enum member as a call of it; nothing is looked up.
    "builtins.getattr": Ignored,
}
MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered_dict,
    # Plain values that no conversion looks at, such as a seed or a path in what a trainer saved besides.
    **dict.fromkeys(
        ("collections.Counter", "builtins.set", "builtins.complex", "builtins.bytearray", "_codecs.encode",
         "torch.device"),
        Ignored,
    ),
}  # fmt: skip
VALUES = ("torch.Tensor", "torch.nn.parameter.Parameter", *(f"torch.{dtype}" for dtype in ITEM_BYTES), *STORAGES)
NAMES = {name: Named(name, make) for name, make in (STAND_INS | MAKERS).items()} | {
    name: Named(name, None) for name in VALUES
}
