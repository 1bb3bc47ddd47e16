"""Reading headers: what is kept after a kill, what several processes give, FLAC lengths without libsndfile."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import trainer.data.index_build as build_module
from trainer.data.audio import AudioError, _flac_num_samples, read_num_samples
from trainer.data.index import build_index

WriteAudio = Callable[..., Path]
REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_flac_lengths_are_those_of_libsndfile(write_audio: WriteAudio, rate: int, channels: int, subtype: str) -> None:
    path = write_audio("a.flac", 0.7, rate, channels, subtype)
    assert _flac_num_samples(str(path)) == soundfile.info(path).frames * 16_000 // rate


def test_what_does_not_begin_as_flac_is_left_to_libsndfile(write_audio: WriteAudio) -> None:
    flac = write_audio("a.flac", 0.7)
    data = flac.read_bytes()
    tagged = flac.with_name("tagged.flac")
    tagged.write_bytes(b"ID3\3\0\0\0\0\0\x0a" + bytes(10) + data)
    unknown = flac.with_name("unknown.flac")
    unknown.write_bytes(data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:])
    for path in (tagged, unknown, write_audio("b.wav", 0.5), write_audio("c.ogg", 0.5)):
        assert _flac_num_samples(str(path)) is None
    assert read_num_samples(str(tagged)) == 11_200


@pytest.mark.parametrize("kept", [0, 41, 42, 60])
def test_flac_cut_within_its_head(write_audio: WriteAudio, kept: int) -> None:
    path = write_audio("a.flac", 2.0)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AudioError) as error:
        read_num_samples(str(path))
    assert error.value.reason in ("unreadable", "truncated or damaged")


def test_processes_give_what_one_gives(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (corpus / "not.wav").write_text("words")
    alone = build_index(str(corpus), str(tmp_path / "1"), progress=False, num_processes=1)
    monkeypatch.setattr(build_module, "_FEW_ROWS", 0)
    monkeypatch.setattr(build_module, "_CHUNK_ROWS", 4)
    together = build_index(str(corpus), str(tmp_path / "2"), progress=False, num_processes=2)
    np.testing.assert_array_equal(together[0].num_samples, alone[0].num_samples)
    assert together[1] == alone[1]


SLOW = """
import sys, time
import trainer.data.index_build as build
from trainer.data.index import build_index
read = build.read_num_samples
def slowly(place):
    if 'go' not in sys.argv: time.sleep(0.1)
    print('read', place, flush=True)
    return read(place)
build.read_num_samples = slowly
build._CHUNK_ROWS, build._NUM_THREADS = 2, 1
build.pa.array([0])  # takes a second the first time
build_index(sys.argv[1], sys.argv[2], progress=False)
"""


def test_after_a_kill_only_the_rest_is_read(tmp_path: Path, corpus: Path) -> None:
    command = [sys.executable, "-c", SLOW, str(corpus), str(tmp_path / "cache")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        num_read = 0
        while sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.partial")) < 1_000:
            assert process.stdout.readline()
            num_read += 1
        process.send_signal(signal.SIGKILL)
    assert list((tmp_path / "cache").glob("*.arrow")) == []
    again = subprocess.run([*command, "go"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 20 - num_read - 3 <= len(again.stdout.splitlines()) <= 20 - 4
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".arrow"]
    index, _ = build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    fresh, _ = build_index(str(corpus), str(tmp_path / "fresh"), progress=False)
    np.testing.assert_array_equal(index.num_samples, fresh.num_samples)


def test_notes_that_break_off_are_used_as_far_as_they_go(tmp_path: Path, corpus: Path) -> None:
    index, _ = build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    (cache,) = (tmp_path / "cache").iterdir()
    for number, content in enumerate([b"", b"words", os.urandom(500)]):
        (tmp_path / "cache" / f"{cache.stem}.other-{number}.partial").write_bytes(content)
    cache.unlink()
    again, _ = build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    np.testing.assert_array_equal(again.num_samples, index.num_samples)
    assert list((tmp_path / "cache").iterdir()) == [cache]


def test_headers_of_flac_files_are_read_fast(tmp_path: Path, corpus: Path) -> None:
    """At least 5,000 a second on one core, of processor time: other programs may be running."""
    for number in range(3_000):
        os.link(corpus / f"{number % 20 % 3}/{number % 20:02d}.flac", tmp_path / f"{number}.flac")
    start = time.process_time()
    build_index(str(tmp_path), str(tmp_path / "cache"), progress=False, num_processes=1)
    assert 3_020 / (time.process_time() - start) > 5_000
    (index,) = (tmp_path / "cache").iterdir()
    names = sum(len(path.relative_to(tmp_path).as_posix()) for path in tmp_path.rglob("*.flac"))
    assert (index.stat().st_size - names) / 3_020 < 64
