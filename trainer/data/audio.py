"""Decode a range of one audio file: mono, 16 kHz, float32. The only place that opens audio."""

import math

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

SAMPLE_RATE = 16_000
"""Samples per second of every waveform this project handles."""

_MARGIN_SAMPLES = 256
# Read on each side of a range for the resampler, in 16 kHz samples. The impulse response of soxr's HQ filter falls
# below 1e-5 within 166 of them at 8 kHz and within 83 at 16 kHz and above.


_TRUNCATED = "truncated or damaged"


class AudioError(Exception):
    """A file that cannot be used as audio; ``reason`` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_num_samples(path: str) -> int:
    """Length of the file in 16 kHz samples, from its header alone. ``decode`` delivers this many.

    Raises:
        AudioError: no audio file, no samples in it, or a header that does not tell the length.
    """
    with _open(path) as file:
        return _num_samples(file)


def decode(path: str, start: int, num_samples: int) -> npt.NDArray[np.float32]:
    """Read samples ``start`` to ``start + num_samples`` of the file, both counted at 16 kHz.

    Seeks to the range and decodes no more than it and a margin for the resampler, so that a range equals the same
    range of the whole file resampled. Channels are averaged.

    Returns:
        float32 waveform, shape [num_samples], full scale at 1.0.

    Raises:
        AudioError: unreadable, shorter than its header or the range promises, NaN or infinite samples, or silence
            (every sample read the same).
    """
    with _open(path) as file:
        if start + num_samples > _num_samples(file):
            raise AudioError(_TRUNCATED)
        if file.samplerate == SAMPLE_RATE:
            return _read_mono(file, start, start + num_samples)
        return _decode_resampled(file, start, num_samples)


def normalise(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Zero mean, unit variance: ``(x - mean) / sqrt(variance + 1e-7)``, as transformers' ``Wav2Vec2FeatureExtractor``.

    Args:
        waveform: float32, shape [num_samples].

    Returns:
        float32, shape [num_samples].
    """
    normalised: npt.NDArray[np.float32] = (waveform - waveform.mean()) / np.sqrt(waveform.var() + np.float32(1e-7))
    return normalised


def _open(path: str) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(path)
    except soundfile.SoundFileError as error:
        raise AudioError("unreadable") from error


def _num_samples(file: soundfile.SoundFile) -> int:
    # A FLAC stream written to a pipe does not know its length; libsndfile then reports 2**63 - 1 frames.
    if file.frames >= 2**62:
        raise AudioError("length unknown")
    num_samples: int = file.frames * SAMPLE_RATE // file.samplerate
    if num_samples <= 0:
        raise AudioError("empty")
    return num_samples


def _read_mono(file: soundfile.SoundFile, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Native frames ``start`` to ``stop`` as float32, shape [stop - start]."""
    try:
        file.seek(start)
        channels = file.read(stop - start, dtype="float32", always_2d=True)  # [N, channels]
    except soundfile.SoundFileError as error:
        raise AudioError(_TRUNCATED) from error
    if len(channels) < stop - start:
        raise AudioError(_TRUNCATED)
    mono: npt.NDArray[np.float32] = channels.mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError("not finite")
    if mono.min() == mono.max():
        raise AudioError("silent")
    return mono


def _decode_resampled(file: soundfile.SoundFile, start: int, num_samples: int) -> npt.NDArray[np.float32]:
    # Both rates meet at multiples of `grid` samples; only a piece that starts on one is resampled in phase.
    grid = SAMPLE_RATE // math.gcd(SAMPLE_RATE, file.samplerate)
    first = max(0, start - _MARGIN_SAMPLES) // grid * grid
    native_start = first * file.samplerate // SAMPLE_RATE
    native_stop = -(-(start + num_samples + _MARGIN_SAMPLES) * file.samplerate // SAMPLE_RATE)  # rounded up
    mono = _read_mono(file, native_start, min(native_stop, file.frames))
    resampled: npt.NDArray[np.float32] = soxr.resample(mono, file.samplerate, SAMPLE_RATE, quality="HQ")
    return resampled[start - first : start - first + num_samples]
