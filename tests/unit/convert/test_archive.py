"""CRC-32 of files without reading their tensors, and of tensors against what their file says."""

import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.convert.archive import ReadExtent, check_read, combine, file_crc32, plain_crc32, tensor_records
from trainer.convert.errors import ConversionError
from trainer.convert.stream import Extent


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "states.pt"
    torch.save({"a": torch.randn(1000), "b": torch.arange(7), "c": torch.empty(0)}, path)
    return path


def read_extent(path: Path, start: int, stop: int) -> ReadExtent:
    return ReadExtent(Extent(path, start, stop), zlib.crc32(path.read_bytes()[start:stop]))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_combined_crc_is_that_of_both_ends_together(first: bytes, second: bytes) -> None:
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_combined_crc_of_a_long_second_part() -> None:
    zeros = bytes(5_000_001)
    assert combine(zlib.crc32(b"a"), zlib.crc32(zeros), len(zeros)) == zlib.crc32(b"a" + zeros)


def test_crc_of_a_torch_file_follows_from_its_records(saved: Path) -> None:
    whole = plain_crc32(saved)
    assert whole == zlib.crc32(saved.read_bytes())
    assert file_crc32(saved) == whole
    record = max(tensor_records(saved), key=lambda record: record.stop - record.start)
    assert record.stop - record.start == 4000
    flip(saved, record.start + 5)
    assert file_crc32(saved) == whole  # vouched for, not read ...
    with pytest.raises(ConversionError, match=rf"states\.pt: the bytes of {record.name} do not have"):
        check_read([read_extent(saved, record.start + 400, record.stop)])  # ... until it is
    flip(saved, record.start - 1)
    assert file_crc32(saved) != whole


def test_other_files_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert tensor_records(tmp_path / "config.json") == []
    assert file_crc32(tmp_path / "config.json") == zlib.crc32(b"{}")


def test_a_file_cut_short_is_no_archive(saved: Path) -> None:
    os.truncate(saved, saved.stat().st_size // 2)
    assert tensor_records(saved) == []
    assert file_crc32(saved) == zlib.crc32(saved.read_bytes())


def test_extents_in_any_order_with_gaps_and_repeats(saved: Path) -> None:
    record = max(tensor_records(saved), key=lambda record: record.stop - record.start)
    at = record.start
    found = [read_extent(saved, at + a, at + b) for a, b in [(2000, 3000), (0, 400), (300, 800), (2000, 3000)]]
    check_read(found)
    check_read([])
    with pytest.raises(ConversionError, match="do not have the CRC-32"):
        check_read([*found, found[0]._replace(crc32=1)])
