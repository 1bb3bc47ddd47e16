"""Audio files to test on, written for each test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

WriteAudio = Callable[..., Path]


@pytest.fixture
def write_audio(tmp_path: Path) -> WriteAudio:
    """``write_audio(name, seconds, rate=16000, channels=1, subtype=None, seed=0)`` writes low-passed noise."""

    def write(
        name: str, seconds: float, rate: int = 16_000, channels: int = 1, subtype: str | None = None, seed: int = 0
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
        smooth = np.stack([np.convolve(channel, np.full(8, 0.05))[: len(noise)] for channel in noise.T], axis=1)
        container = "OGG" if path.suffix == ".opus" else None
        soundfile.write(path, smooth.astype(np.float32), rate, subtype=subtype, format=container)
        return path

    return write


@pytest.fixture
def corpus(tmp_path: Path, write_audio: WriteAudio) -> Path:
    """A folder of 20 files of 0.6 to 2.5 s."""
    for number in range(20):
        write_audio(f"corpus/{number % 3}/{number:02d}.flac", 0.6 + 0.1 * number, seed=number)
    return tmp_path / "corpus"
