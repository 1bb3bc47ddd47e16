"""Rounding and the search for values that are not finite, against torch, bit by bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.convert.dtypes import INFINITY, ITEM_BYTES, all_finite, cast
from trainer.convert.weights import as_bytes, same_bits

FLOATS = ["float32", "bfloat16", "float16"]
BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def as_tensor(content: "np.typing.NDArray[np.uint8]", dtype: str) -> torch.Tensor:
    return torch.from_numpy(content.copy()).view(torch_dtype(dtype))


def assert_cast_as_torch(values: torch.Tensor, source: str, target: str) -> None:
    found = as_tensor(cast(as_bytes(values).numpy(), source, target), target)
    expected = values.to(torch_dtype(target))
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)  # torch itself gives NaNs different bits, by the place in the tensor
    assert same_bits(found[~nan], expected[~nan])


@given(bits=BITS)
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("target", FLOATS)
def test_cast_is_that_of_torch(source: str, target: str, bits: list[int]) -> None:
    size = ITEM_BYTES[source]
    content = np.array(bits * 2, np.uint32).view(np.uint8)
    values = as_tensor(content[: len(content) // size * size], source)
    assert_cast_as_torch(values, source, target)


@pytest.mark.parametrize("target", ["bfloat16", "float16"])
def test_cast_of_halfway_values_and_extremes(target: str) -> None:
    upper = torch.arange(0, 2**16, dtype=torch.int32)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):  # every bfloat16, and what lies at and around halfway
        assert_cast_as_torch(((upper << 16) | lower).view(torch.float32), "float32", target)


@pytest.mark.parametrize("dtype", list(INFINITY))
def test_values_that_are_not_finite(dtype: str) -> None:
    kind = torch_dtype(dtype)
    limits = torch.finfo(kind)
    sound = torch.tensor([0.0, -0.0, 1.5, limits.max, limits.min, limits.tiny, -limits.tiny], dtype=kind)
    assert all_finite(as_bytes(sound).numpy(), dtype)
    assert all_finite(as_bytes(-sound.abs()).numpy(), dtype)
    for wrong in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for place in range(len(sound)):
            damaged = sound.clone()
            damaged[place] = wrong
            assert not all_finite(as_bytes(damaged).numpy(), dtype)
    assert all_finite(np.empty(0, np.uint8), dtype)


def test_integers_are_finite() -> None:
    assert all_finite(np.full(8, 255, np.uint8), "int64")
