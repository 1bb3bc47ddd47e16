"""What is wrong with files in the wild: each is used or left out with a reason, and nothing else happens."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainer.data.audio import AudioError, ByteRange, Place, decode, normalise, read_num_samples
from trainer.data.batching import BatchSpec
from trainer.data.collate import MaskSettings
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.data.index import build_index
from trainer.data.loader import UtteranceDataset
from trainer.data.rows import Skipped

WriteAudio = Callable[..., Path]

NUM_DAMAGED = 300


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes flipped, a stretch zeroed or the end cut off; half of the damage is in the first 100 bytes."""
    spoilt = bytearray(data)
    reach = 100 if rng.random() < 0.5 else len(spoilt)
    match rng.integers(3):
        case 0:
            for position in rng.integers(0, reach, rng.integers(1, 20)).tolist():
                spoilt[position] ^= int(rng.integers(1, 256))
        case 1:
            first = int(rng.integers(0, reach))
            stretch = len(spoilt[first : first + int(rng.integers(1, reach))])
            spoilt[first : first + stretch] = bytes(stretch)
        case _:
            del spoilt[int(rng.integers(0, reach)) :]
    return bytes(spoilt)


def use(place: Place) -> str:
    """What training does with a file: 'used', or why not. Anything but `AudioError` fails the test."""
    try:
        num_samples = read_num_samples(place)
    except AudioError as error:
        return f"header: {error.reason}"
    length = min(num_samples, 16_000)
    try:
        for start in (0, (num_samples - length) // 2, num_samples - length):
            waveform = normalise(decode(place, start, length))
            assert waveform.shape == (length,) and waveform.dtype == np.float32 and np.isfinite(waveform).all()
    except AudioError as error:
        return f"decoding: {error.reason}"
    return "used"


@pytest.mark.parametrize("name", ["a.flac", "a.wav", "a.ogg"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_damaged_files(tmp_path: Path, write_audio: WriteAudio, name: str, rate: int) -> None:
    data = write_audio(name, 3.0, rate, channels=1 + (rate > 16_000)).read_bytes()
    rng = np.random.default_rng(rate + len(data))
    outcomes: Counter[str] = Counter()
    for number in range(NUM_DAMAGED // 6):
        path = tmp_path / f"{number}{name}"
        spoilt = damaged(data, rng)
        path.write_bytes(spoilt)
        outcome = use(str(path))
        outcomes[outcome] += 1
        path.write_bytes(b"before" + spoilt + b"after" * 1_000)
        assert use(ByteRange(str(path), 6, len(spoilt))) == outcome
    assert len(outcomes) >= 3, outcomes  # damage of several kinds
    assert outcomes["used"] < NUM_DAMAGED // 6


def write_dirty(folder: Path) -> dict[str, str]:
    """A file of every kind that is known to turn up, and what is to become of it, by name."""
    rng = np.random.default_rng(0)
    noise = (0.1 * np.convolve(rng.standard_normal(100_000), np.ones(4))).clip(-0.9, 0.9).astype(np.float32)
    fates: dict[str, str] = {}

    def write(name: str, samples: np.ndarray, rate: int = 16_000, fate: str = "used", subtype: str = "PCM_16") -> Path:
        soundfile.write(folder / name, samples, rate, subtype=subtype)
        fates[name] = fate
        return folder / name

    for rate in (8_000, 22_050, 44_100, 48_000):
        write(f"{rate}.wav", noise[: 2 * rate], rate)
    write("stereo.flac", np.stack([noise, noise[::-1]], axis=1))
    write("5.1.wav", np.stack([noise] * 6, axis=1))
    write("clipped.wav", (noise * 100).clip(-1, 1))
    write("beyond full scale.wav", noise * 100, subtype="FLOAT")
    write("a space, a\nnewline and a\ttab.flac", noise)
    write("ünï.flac", noise)
    write("UPPER.FLAC", noise)
    write("silent.flac", np.zeros(40_000), fate="silent")
    write("constant.wav", np.full(40_000, 0.5), fate="silent")
    write("no samples.wav", np.zeros(0), fate="empty")
    write("nan.wav", np.where(np.arange(40_000) == 20_000, np.nan, noise[:40_000]), subtype="FLOAT", fate="not finite")
    cut = write("cut.flac", noise, fate="truncated or damaged")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3])
    head = write("head.flac", noise, fate="truncated or damaged")
    head.write_bytes(head.read_bytes()[:100])
    for name, content in {"zero.flac": b"", "text.wav": b"words\n" * 99, "zeros.mp3": bytes(5_000)}.items():
        (folder / name).write_bytes(content)
        fates[name] = "unreadable"
    (folder / "dangling.flac").symlink_to("nowhere")
    fates["dangling.flac"] = "missing"
    (folder / "circle.flac").symlink_to("circle.flac")
    fates["circle.flac"] = "missing"
    (folder / "folder.wav").mkdir()
    (folder / "up").symlink_to(folder)
    return fates


def test_every_kind_of_file_is_used_or_named(tmp_path: Path) -> None:
    folder = tmp_path / "dirty"
    folder.mkdir()
    fates = write_dirty(folder)
    os.link(folder / "ünï.flac", os.fsencode(folder) + b"/\xff.flac")
    index, skipped = build_index(str(folder), str(tmp_path / "cache"), progress=False)
    found = {os.path.basename(item.path): item.reason for item in skipped}
    assert found.pop("\N{REPLACEMENT CHARACTER}.flac") == "file name not UTF-8"
    dataset = UtteranceDataset(index, WAV2VEC2_GEOMETRY, MaskSettings(0.65, 10, 5), seed=0, random_crop=False)
    length = int(index.num_samples.min())
    batch = dataset[BatchSpec(0, tuple(range(len(index))), length)]
    # Crops from the middle: what is broken elsewhere shows when its turn comes.
    found |= {os.path.basename(item.path): item.reason for item in batch.skipped}
    used = set(fates) - set(found)
    assert {name: found.get(name, "used") for name in fates} == fates
    assert batch.input_values.shape == (len(used), length)
    assert np.isfinite(batch.input_values.numpy()).all()


def test_a_file_that_goes_while_training(tmp_path: Path, corpus: Path) -> None:
    index, _ = build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    dataset = UtteranceDataset(index, WAV2VEC2_GEOMETRY, MaskSettings(0.65, 10, 5), seed=0, random_crop=True)
    before = dataset[BatchSpec(3, (4, 5, 6), 9_000)]
    Path(index.path(5)).unlink()
    first, again = (dataset[BatchSpec(3, (4, 5, 6), 9_000)] for _ in range(2))
    assert first.skipped == again.skipped == (Skipped(index.path(5), "missing"),)
    for batch in (first, again):  # the others are as they would have been
        np.testing.assert_array_equal(batch.input_values.numpy(), before.input_values.numpy()[[0, 2]])
        np.testing.assert_array_equal(batch.mask.numpy(), before.mask.numpy()[[0, 2]])


def test_a_file_without_permission(tmp_path: Path, write_audio: WriteAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_audio("a.wav", 1.0)

    def refuse(*_: object) -> int:  # root may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(AudioError) as error:
        read_num_samples(str(path))
    assert error.value.reason == "no permission"


@pytest.mark.parametrize("rate", [100, 3_999, 800_000])
def test_a_rate_that_no_recording_has(write_audio: WriteAudio, rate: int) -> None:
    path = write_audio("a.wav", 10_000 / rate, rate)
    assert use(str(path)) == "header: sample rate out of range"


def test_a_range_beyond_the_end_of_its_file(write_audio: WriteAudio) -> None:
    path = write_audio("a.wav", 1.0)
    size = path.stat().st_size
    assert use(ByteRange(str(path), 0, size)) == "used"
    assert use(ByteRange(str(path), size, 1_000)) == "header: unreadable"
    assert use(ByteRange(str(path.with_name("gone.tar")), 0, 1_000)) == "header: missing"
