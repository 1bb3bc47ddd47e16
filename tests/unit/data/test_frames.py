import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.frames import WAV2VEC2_GEOMETRY, FrameGeometry

layers = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=5)


def geometry_of(layers: list[tuple[int, int]]) -> FrameGeometry:
    return FrameGeometry(tuple(kernel for kernel, _ in layers), tuple(stride for _, stride in layers))


@pytest.mark.parametrize(
    ("num_samples", "num_frames"), [(0, 0), (399, 0), (400, 1), (719, 1), (720, 2), (16_000, 49), (250_000, 781)]
)
def test_published_geometry(num_samples: int, num_frames: int) -> None:
    assert WAV2VEC2_GEOMETRY.num_frames(num_samples) == num_frames


@settings(deadline=None)
@given(layers, st.integers(1, 600))
def test_num_frames_is_what_convolutions_give(layers: list[tuple[int, int]], num_samples: int) -> None:
    signal = torch.zeros(1, 1, num_samples)
    for kernel, stride in layers:
        if signal.shape[-1] < kernel:
            assert geometry_of(layers).num_frames(num_samples) == 0
            return
        signal = torch.nn.functional.conv1d(signal, torch.ones(1, 1, kernel), stride=stride)
    assert geometry_of(layers).num_frames(num_samples) == signal.shape[-1]


@settings(deadline=None)
@given(layers, st.integers(1, 1000))
def test_min_samples_is_the_fewest(layers: list[tuple[int, int]], num_frames: int) -> None:
    geometry = geometry_of(layers)
    fewest = geometry.min_samples(num_frames)
    assert geometry.num_frames(fewest) == num_frames
    assert geometry.num_frames(fewest - 1) == num_frames - 1


def test_min_samples_of_no_frames() -> None:
    assert WAV2VEC2_GEOMETRY.min_samples(0) == 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**7), min_size=1))
def test_arrays_agree_with_ints(lengths: list[int]) -> None:
    frames = WAV2VEC2_GEOMETRY.num_frames(np.array(lengths, dtype=np.int64))
    assert frames.dtype == np.int64
    assert frames.tolist() == [WAV2VEC2_GEOMETRY.num_frames(length) for length in lengths]
