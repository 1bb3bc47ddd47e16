"""CRC-32 of checkpoint files without reading what a conversion does not need.

torch saves zip archives that hold a CRC-32 of every tensor's bytes. The CRC-32 of the whole file follows from those and
from the bytes between them, so a manifest can be checked without reading the tensors: two thirds of a ZeRO checkpoint
are moments of Adam. The tensors that are read are then held against the archive's own CRC-32.
"""

import re
import struct
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.convert.errors import ConversionError
from trainer.convert.stream import Extent

TENSOR_RECORD = re.compile(r"[^/]+/data/\d+")
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field after it
SIGNATURE = b"PK\x03\x04"
UTF8_FLAG = 1 << 11
READ_BYTES = 1 << 18
POLYNOMIAL = 0xEDB88320  # CRC-32 of zip files, bits reversed: x^0 is the highest bit
ONE = 1 << 31


class Record(NamedTuple):
    """The bytes of one member of a file of torch, and the CRC-32 that the file says they have."""

    name: str
    start: int
    stop: int
    crc32: int


class ReadExtent(NamedTuple):
    """A part of a file that was read, and the CRC-32 it had."""

    extent: Extent
    crc32: int


def read_records(path: Path) -> list[Record]:
    """The members of a file that torch saved, in the order of their bytes; compressed ones, of others, are left out.

    Raises:
        ConversionError: it is not such a file, is cut short, or has members that overlap.
    """
    records = []
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.compress_type == zipfile.ZIP_STORED:
                    start = _content_start(file, info)
                    records.append(Record(info.filename, start, start + info.compress_size, info.CRC))
        _check_places(records, path.stat().st_size)
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: missing; copy the whole checkpoint folder.") from error
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError) as error:
        raise ConversionError(
            f"{path}: not a readable torch file ({error}); copy the checkpoint again or take another one."
        ) from error
    return records


def _content_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    signature, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    encoding = "utf-8" if info.flag_bits & UTF8_FLAG else "cp437"
    if signature != SIGNATURE or file.read(name_length) != info.orig_filename.encode(encoding):
        raise zipfile.BadZipFile(f"{info.filename} is not where the directory says")
    return int(info.header_offset + LOCAL_HEADER.size + name_length + extra_length)


def _check_places(records: list[Record], file_bytes: int) -> None:
    records.sort(key=lambda record: (record.start, record.stop))
    position, names = 0, set()
    for record in records:
        if record.start < position or record.name in names:
            raise zipfile.BadZipFile(f"{record.name} overlaps what precedes it, or is there twice")
        position = record.stop
        names.add(record.name)
    if position > file_bytes:
        raise zipfile.BadZipFile("it ends within a tensor")


def tensor_records(path: Path) -> list[Record]:
    """The tensor storages of a file that torch saved, in the order of their bytes; none if it is another file."""
    if not zipfile.is_zipfile(path):
        return []
    return [record for record in read_records(path) if TENSOR_RECORD.fullmatch(record.name)]


def file_crc32(path: Path) -> int:
    """CRC-32 of a file. Of a file of torch it reads all but the tensors, whose CRC-32 stands in the file."""
    crc, position = 0, 0
    with path.open("rb") as file:
        for record in tensor_records(path):
            crc = _read(file, position, record.start, crc)
            crc = combine(crc, record.crc32, record.stop - record.start)
            position = record.stop
        return _read(file, position, path.stat().st_size, crc)


def plain_crc32(path: Path) -> int:
    """CRC-32 of a file, all of it read."""
    with path.open("rb") as file:
        return _read(file, 0, path.stat().st_size, 0)


def check_read(found: Sequence[ReadExtent]) -> None:
    """Hold what was read of files of torch against the CRC-32 they store; what was not read of a tensor is read here.

    Raises:
        ConversionError: the bytes of a tensor have another CRC-32.
    """
    for path in sorted({part.extent.path for part in found}):
        known = {part.extent.start: part for part in found if part.extent.path == path}
        starts = sorted(known)
        with path.open("rb") as file:
            for record in tensor_records(path):
                inside = starts[bisect_left(starts, record.start) : bisect_left(starts, record.stop)]
                if inside and _record_crc32(file, record, [known[start] for start in inside]) != record.crc32:
                    raise ConversionError(
                        f"{path}: the bytes of {record.name} do not have the CRC-32 that stands beside them; copy it "
                        "again, or take another checkpoint."
                    )


def _record_crc32(file: BinaryIO, record: Record, parts: Sequence[ReadExtent]) -> int:
    crc, position = 0, record.start
    for (_, start, stop), part_crc in parts:
        if start < position:
            continue  # a weight that is cut elsewhere for a second name: read below what it adds
        crc = combine(_read(file, position, start, crc), part_crc, stop - start)
        position = stop
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
