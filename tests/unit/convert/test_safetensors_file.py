"""Headers of safetensors files: those of the library are read, and what it refuses is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer.convert.errors import ConversionError
from trainer.convert.safetensors_file import read_header
from trainer.convert.weights import Weight, same_bits


def test_files_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 2),
        "bfloat16": torch.randn(3).bfloat16(),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, (shape, dtype, extent) in found.items():
        assert same_bits(Weight(name, shape, dtype, (extent,)).read(), tensors[name]), name


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def write(path: Path, header: object, num_bytes: int, *, header_bytes: int | None = None) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", header_bytes or len(encoded)) + encoded + bytes(num_bytes))


DAMAGES: dict[str, tuple[object, int]] = {
    "cut short": ({"a": entry()}, 7),
    "longer than its tensors": ({"a": entry()}, 9),
    "a gap": ({"a": entry(), "b": entry(data_offsets=[12, 20])}, 20),
    "an overlap": ({"a": entry(), "b": entry(data_offsets=[4, 12])}, 12),
    "a shape of another size": ({"a": entry(shape=[3])}, 8),
    "a negative place": ({"a": entry(data_offsets=[-8, 0])}, 0),
    "a negative shape": ({"a": entry(shape=[-1, -2])}, 8),
    "a shape that is no number": ({"a": entry(shape=[2.0])}, 8),
    "an unknown type": ({"a": entry(dtype="F31")}, 8),
    "an entry without a place": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "an entry that is a list": ({"a": []}, 8),
    "a header that is a list": ([], 0),
    "a header that is no JSON": (b"{", 0),
    "a header that is nested without end": (b'{"a":' * 100_000, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    write(path, *DAMAGES[damage])
    with pytest.raises(ConversionError, match=r"x\.safetensors: not a readable safetensors file"):
        read_header(path)
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    for header_bytes in (1000, 2**63):
        write(tmp_path / "x.safetensors", {"a": entry()}, 8, header_bytes=header_bytes)
        with pytest.raises(ConversionError, match="not a readable safetensors file"):
            read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match="not a readable safetensors file"):
        read_header(tmp_path / "x.safetensors")
