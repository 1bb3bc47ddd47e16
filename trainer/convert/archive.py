"""CRC-32 of checkpoint files without reading what a conversion does not need.

torch saves zip archives that hold a CRC-32 of every tensor's bytes. The CRC-32 of the whole file follows from those and
from the bytes between them, so a manifest can be checked without reading the tensors: two thirds of a ZeRO checkpoint
are moments of Adam. The tensors that are read are then held against the archive's own CRC-32.
"""

import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.convert.errors import ConversionError
from trainer.convert.stream import Extent

TENSOR_RECORD = re.compile(r".*/data/\d+")
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field after it
READ_BYTES = 1 << 21
POLYNOMIAL = 0xEDB88320  # CRC-32 of zip files, bits reversed: x^0 is the highest bit
ONE = 1 << 31


class Record(NamedTuple):
    """The bytes of one tensor storage in a file of torch, and the CRC-32 that the file says they have."""

    name: str
    start: int
    stop: int
    crc32: int


class ReadBlock(NamedTuple):
    """A part of a file that was read, and the CRC-32 it had."""

    extent: Extent
    crc32: int


def tensor_records(path: Path) -> list[Record]:
    """The tensor storages of a file that torch saved, in the order of their bytes; none if it is another file."""
    if not zipfile.is_zipfile(path):
        return []
    records = []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if TENSOR_RECORD.fullmatch(info.filename) and info.compress_type == zipfile.ZIP_STORED:
                    file.seek(info.header_offset)
                    _, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                    start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
                    records.append(Record(info.filename, start, start + info.file_size, info.CRC))
    except (zipfile.BadZipFile, struct.error, OSError, ValueError) as error:
        raise ConversionError(f"{path}: not a readable torch file ({error}); copy the checkpoint again.") from error
    return sorted(records, key=lambda record: record.start)


def file_crc32(path: Path) -> int:
    """CRC-32 of a file. Of a file of torch it reads all but the tensors, whose CRC-32 stands in the file."""
    crc, position = 0, 0
    with path.open("rb") as file:
        for record in tensor_records(path):
            if record.start < position:
                raise ConversionError(f"{path}: {record.name} overlaps what precedes it; copy the checkpoint again.")
            crc = _read(file, position, record.start, crc)
            crc = combine(crc, record.crc32, record.stop - record.start)
            position = record.stop
        return _read(file, position, path.stat().st_size, crc)


def plain_crc32(path: Path) -> int:
    """CRC-32 of a file, all of it read."""
    with path.open("rb") as file:
        return _read(file, 0, path.stat().st_size, 0)


def check_blocks(blocks: Sequence[ReadBlock]) -> None:
    """Hold what was read of files of torch against the CRC-32 they store; what was not read of a tensor is read here.

    Raises:
        ConversionError: the bytes of a tensor have another CRC-32.
    """
    for path in sorted({block.extent.path for block in blocks}):
        known = {block.extent.start: block for block in blocks if block.extent.path == path}
        starts = sorted(known)
        with path.open("rb") as file:
            for record in tensor_records(path):
                inside = [known[start] for start in starts if record.start <= start < record.stop]
                if inside and _record_crc32(file, record, inside) != record.crc32:
                    raise ConversionError(
                        f"{path}: the bytes of {record.name} do not have the CRC-32 that stands beside them; copy it "
                        "again, or take another checkpoint."
                    )


def _record_crc32(file: BinaryIO, record: Record, blocks: Sequence[ReadBlock]) -> int:
    crc, position = 0, record.start
    for block in blocks:
        if block.extent.start < position:
            continue  # a weight that is cut elsewhere for a second name: read below what it adds
        crc = _read(file, position, block.extent.start, crc)
        crc = combine(crc, block.crc32, block.extent.stop - block.extent.start)
        position = block.extent.stop
    return _read(file, position, record.stop, crc)


def combine(first: int, second: int, second_length: int) -> int:
    """CRC-32 of two byte strings end to end, from their own and the length of the second (zlib's crc32_combine)."""
    return _multiply(_power_of_x(8 * second_length), first) ^ second


@lru_cache(maxsize=4096)
def _power_of_x(exponent: int) -> int:
    power, square = ONE, ONE >> 1
    while exponent:
        if exponent & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        exponent >>= 1
    return power


def _multiply(left: int, right: int) -> int:
    """Product of two polynomials over GF(2), modulo that of the CRC."""
    product = 0
    while left:
        if left & ONE:
            product ^= right
        left = (left << 1) & 0xFFFFFFFF
        right = (right >> 1) ^ (POLYNOMIAL if right & 1 else 0)
    return product


def _read(file: BinaryIO, start: int, stop: int, crc: int) -> int:
    """The CRC-32 `crc`, carried on over these bytes of a file."""
    file.seek(start)
    while start < stop and (content := file.read(min(READ_BYTES, stop - start))):
        crc = zlib.crc32(content, crc)
        start += len(content)
    return crc
