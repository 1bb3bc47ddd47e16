"""Decode a range of one audio file: mono, 16 kHz, float32. The only place that opens audio."""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

SAMPLE_RATE = 16_000
"""Samples per second of every waveform this project handles."""

_MARGIN_SAMPLES = 256
# Read on each side of a range for the resampler, in 16 kHz samples. The impulse response of soxr's HQ filter falls
# below 1e-5 within 166 of them at 8 kHz and within 83 at 16 kHz and above.

SILENT = "silent"
"""Reason of an `AudioError`: every sample that was read is the same."""
_TRUNCATED = "truncated or damaged"
_RATES = range(4_000, 768_001)
# Hz. A damaged header may claim any rate, and the length in 16 kHz samples follows from it.
_FLAC_HEADER_BYTES = 42
_READ_BYTES = 1 << 16


class AudioError(Exception):
    """A file that cannot be used as audio; ``reason`` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ByteRange(NamedTuple):
    """An audio file that lies within another file: a member of a tar shard, a value in an Arrow file."""

    path: str
    offset: int
    length: int


Place = str | ByteRange
"""Where an audio file is: a path, or bytes of another file."""


def read_num_samples(place: Place) -> int:
    """Length of the file in 16 kHz samples, from its header alone. ``decode`` delivers this many.

    Raises:
        AudioError: no audio file, no samples in it, or a header that does not tell the length.
    """
    num_samples = _flac_num_samples(place)
    if num_samples is not None:
        return num_samples
    with _open(place) as file:
        return _num_samples(file)


def decode(place: Place, start: int, num_samples: int) -> npt.NDArray[np.float32]:
    """Read samples ``start`` to ``start + num_samples`` of the file, both counted at 16 kHz.

    Seeks to the range and decodes no more than it and a margin for the resampler, so that a range equals the same
    range of the whole file resampled. Channels are averaged.

    Returns:
        float32 waveform, shape [num_samples], full scale at 1.0.

    Raises:
        AudioError: unreadable, shorter than its header or the range promises, NaN or infinite samples, or silence
            (every sample read the same).
    """
    with _open(place) as file:
        if start + num_samples > _num_samples(file):
            raise AudioError(_TRUNCATED)
        if file.samplerate == SAMPLE_RATE:
            return _read_mono(file, start, start + num_samples)
        return _decode_resampled(file, start, num_samples)


def has_sound(place: Place) -> bool:
    """Whether the samples of the file differ at all; reads from its beginning until they do. Raises `AudioError`."""
    first: np.float32 | None = None
    with _open(place) as file:
        try:
            for channels in file.blocks(_READ_BYTES, dtype="float32", always_2d=True):  # [N, channels]
                mono = channels.mean(axis=1)
                first = mono[0] if first is None else first
                if (mono != first).any():
                    return True
        except soundfile.SoundFileError as error:
            raise AudioError(_TRUNCATED) from error
    return False


def normalise(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Zero mean, unit variance: ``(x - mean) / sqrt(variance + 1e-7)``, as transformers' ``Wav2Vec2FeatureExtractor``.

    Args:
        waveform: float32, shape [num_samples].

    Returns:
        float32, shape [num_samples].
    """
    centred: npt.NDArray[np.float32] = waveform - waveform.mean()
    centred /= np.sqrt(np.square(centred).mean() + np.float32(1e-7))
    return centred


@contextlib.contextmanager
def _open(place: Place) -> Iterator[soundfile.SoundFile]:
    path = place if isinstance(place, str) else place.path
    with contextlib.ExitStack() as stack:
        try:
            source = place if isinstance(place, str) else stack.enter_context(_open_range(place))
            file = stack.enter_context(soundfile.SoundFile(source))
        except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: a name in .raw has no header
            raise AudioError(_why_not_opened(path)) from error
        yield file


def _why_not_opened(path: str) -> str:
    if not os.path.exists(path):
        return "missing"
    return "unreadable" if os.access(path, os.R_OK) else "no permission"


def _open_range(place: ByteRange) -> io.BufferedReader:
    return io.BufferedReader(_RangeReader(place), _READ_BYTES)


class _RangeReader(io.RawIOBase):
    """Some bytes of a file as a file of their own: libsndfile cannot read most formats from the middle of one."""

    def __init__(self, place: ByteRange) -> None:
        self.descriptor = os.open(place.path, os.O_RDONLY)
        self.offset = place.offset
        self.length = place.length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self.length - self.position))
        try:
            count = os.preadv(self.descriptor, [buffer[:wanted]], self.offset + self.position)
        except OSError:  # libsndfile calls this: an end of the file too early is all it understands
            return 0
        self.position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()


def _num_samples(file: soundfile.SoundFile) -> int:
    # A FLAC stream written to a pipe does not know its length; libsndfile then reports 2**63 - 1 frames.
    if file.frames >= 2**62:
        raise AudioError("length unknown")
    return _at_16_khz(file.frames, file.samplerate)


def _at_16_khz(num_frames: int, rate: int) -> int:
    if rate not in _RATES:
        raise AudioError("sample rate out of range")
    num_samples = num_frames * SAMPLE_RATE // rate
    if num_samples <= 0:
        raise AudioError("empty")
    return num_samples


def _flac_num_samples(place: Place) -> int | None:
    """Length of a FLAC file by its STREAMINFO block (RFC 9639, section 8.2), a tenth of libsndfile's work.

    None where this is no FLAC file, does not begin with that block, or does not say: libsndfile decides then.
    """
    path, offset, length = (place, 0, None) if isinstance(place, str) else place
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise AudioError(_why_not_opened(path)) from error
    try:
        if length is None:
            length = os.fstat(descriptor).st_size
        head = os.pread(descriptor, max(0, min(_FLAC_HEADER_BYTES, length)), offset)
    except OSError as error:
        raise AudioError("unreadable") from error
    finally:
        os.close(descriptor)
    if len(head) < _FLAC_HEADER_BYTES or head[:4] != b"fLaC" or head[4] & 0x7F or head[5:8] != b"\0\0\x22":
        return None
    largest_block = int.from_bytes(head[10:12], "big")
    packed = int.from_bytes(head[18:26], "big")  # rate 20 bits, channels 3, bits per sample 5, samples 36
    rate, num_frames = packed >> 44, packed & (1 << 36) - 1
    if not rate or not num_frames or largest_block < 16:
        return None
    # What the smallest frame takes, where the encoder noted it, but for the last one, which may be shorter. At least a
    # header of 6 bytes, a subframe of 2 and a checksum of 2.
    smallest = max(int.from_bytes(head[12:15], "big"), 10)
    if length < _FLAC_HEADER_BYTES + num_frames // largest_block * smallest:
        raise AudioError(_TRUNCATED)
    return _at_16_khz(num_frames, rate)


def _read_mono(file: soundfile.SoundFile, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Native frames ``start`` to ``stop`` as float32, shape [stop - start]."""
    try:
        file.seek(start)
        channels = file.read(stop - start, dtype="float32", always_2d=True)  # [N, channels]
    except soundfile.SoundFileError as error:
        raise AudioError(_TRUNCATED) from error
    if len(channels) < stop - start:
        raise AudioError(_TRUNCATED)
    mono: npt.NDArray[np.float32] = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1)
    lowest, highest = mono.min(), mono.max()  # NaN where any sample is
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise AudioError("not finite")
    if lowest == highest:
        raise AudioError(SILENT)
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
