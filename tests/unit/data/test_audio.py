from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import transformers

from trainer.data.audio import AudioError, decode, normalise, read_num_samples

WriteAudio = Callable[..., Path]


def whole(path: Path) -> np.ndarray:
    return decode(str(path), 0, read_num_samples(str(path)))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_crop_equals_the_same_range_of_the_whole_file(write_audio: WriteAudio, rate: int) -> None:
    path = write_audio("a.wav", 5.0, rate, subtype="FLOAT")
    full = whole(path)
    assert len(full) == 80_000
    for start, num_samples in [(0, 500), (1, 16_000), (12_345, 6_789), (40_001, 1), (70_000, 10_000)]:
        crop = decode(str(path), start, num_samples)
        assert crop.dtype == np.float32
        np.testing.assert_allclose(crop, full[start : start + num_samples], atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_time_and_level(tmp_path: Path, rate: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3 * rate) / rate)
    soundfile.write(tmp_path / "tone.wav", tone, rate, subtype="FLOAT")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(9_000, 30_000) / 16_000)
    np.testing.assert_allclose(decode(str(tmp_path / "tone.wav"), 9_000, 21_000), expected, atol=1e-3)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_whole_file_is_what_soxr_gives(write_audio: WriteAudio, rate: int) -> None:
    path = write_audio("a.wav", 2.0, rate, subtype="FLOAT")
    native, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(whole(path), soxr.resample(native, rate, 16_000), atol=1e-4)


def test_16_khz_is_left_alone(write_audio: WriteAudio) -> None:
    path = write_audio("a.flac", 1.0)
    native, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(decode(str(path), 100, 5_000), native[100:5_100])


def test_channels_are_averaged(write_audio: WriteAudio) -> None:
    path = write_audio("a.wav", 1.0, channels=3)
    native, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(whole(path), native.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3", "a.aiff", "a.w64", "a.caf", "a.au"])
def test_formats_seek_to_the_same_samples(write_audio: WriteAudio, name: str) -> None:
    rate = 48_000 if name == "a.opus" else 44_100
    path = write_audio(name, 4.0, rate, channels=2, subtype="OPUS" if name == "a.opus" else None)
    full = whole(path)
    assert len(full) == 64_000
    np.testing.assert_allclose(decode(str(path), 30_000, 20_000), full[30_000:50_000], atol=1e-3)


@pytest.mark.parametrize("rate", [7_999, 11_127, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("frames", [3, 7, 1_000, 1_001, 22_051])
def test_header_promises_what_decode_delivers(write_audio: WriteAudio, rate: int, frames: int) -> None:
    path = write_audio("a.wav", frames / rate, rate, subtype="FLOAT")
    assert soundfile.info(path).frames == frames
    promised = read_num_samples(str(path))
    assert promised == frames * 16_000 // rate
    assert len(whole(path)) == promised
    last = min(promised, 2)
    assert len(decode(str(path), promised - last, last)) == last


def test_range_past_the_end(write_audio: WriteAudio) -> None:
    path = write_audio("a.flac", 1.0)
    with pytest.raises(AudioError) as error:
        decode(str(path), 8_000, 8_001)
    assert error.value.reason == "truncated or damaged"


def test_a_crop_does_not_decode_what_comes_before(write_audio: WriteAudio) -> None:
    path = write_audio("a.flac", 20.0)
    damaged = bytearray(path.read_bytes())
    damaged[20_000:30_000] = bytes(10_000)
    path.write_bytes(damaged)
    with pytest.raises(AudioError):
        whole(path)
    assert len(decode(str(path), 240_000, 16_000)) == 16_000


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("name", ["a.flac", "a.mp3"])
def test_truncated_file(write_audio: WriteAudio, name: str, rate: int) -> None:
    path = write_audio(name, 4.0, rate)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    try:
        assert read_num_samples(str(path)) == 64_000
    except AudioError as found:  # a FLAC header tells how short a frame can be, and so many may not fit
        assert name == "a.flac" and found.reason == "truncated or damaged"
    for start, num_samples in [(0, 64_000), (50_000, 10_000)]:
        with pytest.raises(AudioError) as error:
            decode(str(path), start, num_samples)
        assert error.value.reason == "truncated or damaged"


@pytest.mark.parametrize("name", ["a.wav", "a.ogg", "a.opus"])
def test_truncated_file_of_a_format_whose_length_is_its_size(write_audio: WriteAudio, name: str) -> None:
    path = write_audio(name, 4.0, subtype="OPUS" if name == "a.opus" else None)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    promised = read_num_samples(str(path))
    assert 8_000 < promised < 40_000
    assert len(whole(path)) == promised


def spoilt(name: str, value: float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        samples = np.full(16_000, 0.1, dtype=np.float32)
        samples[::2] = -0.1
        samples[500] = value
        soundfile.write(folder / name, samples, 16_000, subtype="FLOAT")
        return folder / name

    return write


def constant(value: float, rate: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        soundfile.write(folder / "constant.wav", np.full((rate, 2), value), rate)
        return folder / "constant.wav"

    return write


def content(data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "a.wav").write_bytes(data)
        return folder / "a.wav"

    return write


def no_samples(folder: Path) -> Path:
    soundfile.write(folder / "a.wav", np.zeros(0), 16_000)
    return folder / "a.wav"


def streamed_flac(folder: Path) -> Path:
    soundfile.write(folder / "a.flac", np.random.default_rng(0).standard_normal(16_000) * 0.1, 16_000)
    data = bytearray((folder / "a.flac").read_bytes())
    data[21] &= 0xF0  # the number of samples in STREAMINFO: 36 bits, 0 where unknown
    data[22:26] = bytes(4)
    (folder / "a.flac").write_bytes(data)
    return folder / "a.flac"


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (content(b""), "unreadable"),
        (content(b"This is not audio.\n" * 100), "unreadable"),
        (lambda folder: folder / "missing.wav", "missing"),
        (no_samples, "empty"),
        (streamed_flac, "length unknown"),
        (spoilt("nan.wav", np.nan), "not finite"),
        (spoilt("inf.wav", -np.inf), "not finite"),
        (constant(0.0, 16_000), "silent"),
        (constant(0.0, 44_100), "silent"),
        (constant(0.25, 16_000), "silent"),
    ],
)
def test_bad_files_name_the_reason(tmp_path: Path, write: Callable[[Path], Path], reason: str) -> None:
    path = write(tmp_path)
    with pytest.raises(AudioError) as error:
        decode(str(path), 0, 16_000 if reason not in ("unreadable", "missing", "empty") else 1)
    assert error.value.reason == reason


def test_normalise_equals_the_feature_extractor() -> None:
    waveform = (0.03 * np.random.default_rng(0).standard_normal(16_000) + 0.01).astype(np.float32)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    expected = extractor(waveform, sampling_rate=16_000, return_tensors="np").input_values[0]
    normalised = normalise(waveform)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised, expected, atol=1e-5)
