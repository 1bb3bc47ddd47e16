"""What a safetensors file holds and where, without loading it.

The format (https://github.com/huggingface/safetensors#format): the header's length in 8 bytes, a JSON header with the
type, shape and place of each tensor, then the bytes of the tensors without gaps.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from trainer.convert.dtypes import ITEM_BYTES, SAFETENSORS_NAMES
from trainer.convert.errors import ConversionError
from trainer.convert.stream import Extent

MAX_HEADER_BYTES = 100_000_000  # safetensors itself reads no longer one
DTYPES = {short: name for name, short in SAFETENSORS_NAMES.items()}


class Entry(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: str
    extent: Extent


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by their names, in the order of their bytes.

    Raises:
        ConversionError: the file is not safetensors, is cut short, or has gaps, overlaps or unknown types.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(file.read(length))
        entries = {
            name: _entry(path, 8 + length, described) for name, described in header.items() if name != "__metadata__"
        }
        found = dict(sorted(entries.items(), key=lambda item: item[1].extent))
        _check_places(found, 8 + length, path.stat().st_size)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{path}: not a readable safetensors file ({error}); copy the checkpoint again or take another one."
        ) from error
    return found


def _entry(path: Path, first: int, described: dict[str, Any]) -> Entry:
    start, stop = described["data_offsets"]
    dtype, shape = DTYPES[described["dtype"]], tuple(described["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError("places and shapes must be counts")
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{stop - start} bytes for a tensor of shape {list(shape)} and type {dtype}")
    return Entry(shape, dtype, Extent(path, first + start, first + stop))


def _check_places(entries: dict[str, Entry], first: int, file_bytes: int) -> None:
    position = first
    for name, entry in entries.items():
        if entry.extent.start != position:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        position = entry.extent.stop
    if position != file_bytes:
        raise ValueError(f"it has {file_bytes} bytes, and its tensors end at byte {position}")
