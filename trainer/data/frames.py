"""Samples <-> frames of the convolutional feature encoder: the only copy of this arithmetic."""

from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class FrameGeometry:
    """Kernel and stride of each layer of an unpadded convolution stack (wav2vec 2.0, arXiv:2006.11477, section 2)."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]

    @overload
    def num_frames(self, num_samples: int) -> int: ...

    @overload
    def num_frames(self, num_samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...

    def num_frames(self, num_samples: int | npt.NDArray[np.int64]) -> int | npt.NDArray[np.int64]:
        """Frames the stack makes of a waveform: ``floor((n - kernel) / stride) + 1`` per layer, never below 0.

        Args:
            num_samples: one length in samples, or an integer array of them (any shape).

        Returns:
            An ``int`` for an ``int``, an int64 array of the same shape for an array.
        """
        lengths = np.asarray(num_samples, dtype=np.int64)
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            lengths = np.maximum((lengths - kernel) // stride + 1, 0)
        return int(lengths) if isinstance(num_samples, int) else lengths

    def min_samples(self, num_frames: int) -> int:
        """Fewest samples that give ``num_frames`` frames (0 for 0 frames)."""
        if num_frames <= 0:
            return 0
        num_samples = num_frames
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            num_samples = (num_samples - 1) * stride + kernel
        return num_samples


WAV2VEC2_GEOMETRY = FrameGeometry(kernels=(10, 3, 3, 3, 3, 2, 2), strides=(5, 2, 2, 2, 2, 2, 2))
"""One frame per 320 samples (20 ms at 16 kHz), each of which sees 400 samples (25 ms)."""
