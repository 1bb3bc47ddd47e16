import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import trainer.data.index_build as build_module
from trainer.data.audio import read_num_samples
from trainer.data.index import (
    AudioIndex,
    DataError,
    Skipped,
    build_index,
    filter_by_duration,
    find_index,
    split_validation,
)
from trainer.data.rows import Request

WriteAudio = Callable[..., Path]


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths whose header was read, in any order."""
    read: list[str] = []

    def spy(path: str) -> int:
        read.append(path)
        return read_num_samples(path)

    monkeypatch.setattr(build_module, "read_num_samples", spy)
    return read


def index_of(seconds: list[float]) -> AudioIndex:
    num_samples = (np.array(seconds) * 16_000).astype(np.int64)
    tags = (np.arange(len(seconds)) % 2).astype(np.int16)
    return AudioIndex("/corpus", (), num_samples, np.arange(len(seconds)), tags, ["de", "en"], [0, 0])


def test_rows_are_the_files_in_order(tmp_path: Path, write_audio: WriteAudio) -> None:
    write_audio("corpus/b.flac", 1.5)
    write_audio("corpus/a/c.wav", 0.5, rate=48_000)
    index, skipped = build_index(str(tmp_path / "corpus"), str(tmp_path / "cache"), progress=False)
    assert skipped == []
    assert [index.path(row) for row in range(len(index))] == [
        str(tmp_path / "corpus/a/c.wav"),
        str(tmp_path / "corpus/b.flac"),
    ]
    assert index.num_samples.tolist() == [8_000, 24_000]
    assert index.ids.tolist() == [0, 1]
    assert index.hours == pytest.approx(2 / 3600)


def test_unreadable_files_are_skipped_and_remembered(
    tmp_path: Path, corpus: Path, write_audio: WriteAudio, headers_read: list[str]
) -> None:
    (corpus / "text.wav").write_text("not audio")
    (corpus / "empty.flac").touch()
    (corpus / "dangling.mp3").symlink_to("nowhere")
    first = build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    reasons = {"dangling.mp3": "missing", "empty.flac": "unreadable", "text.wav": "unreadable"}
    assert first[1] == [Skipped(str(corpus / name), reason) for name, reason in reasons.items()]
    assert len(first[0]) == 20
    assert len(headers_read) == 23
    headers_read.clear()
    again = build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    assert headers_read == []
    assert again[1] == first[1]
    assert [again[0].path(row) for row in range(20)] == [first[0].path(row) for row in range(20)]
    np.testing.assert_array_equal(again[0].num_samples, first[0].num_samples)


def test_a_name_that_is_not_utf8_is_skipped(tmp_path: Path, corpus: Path) -> None:
    os.link(corpus / "0/00.flac", os.fsencode(corpus) + b"/\xff.flac")
    index, skipped = build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    assert len(index) == 20
    assert [entry.reason for entry in skipped] == ["file name not UTF-8"]


def add(corpus: Path) -> list[str]:
    (corpus / "new.flac").write_bytes((corpus / "0/00.flac").read_bytes())
    return ["new.flac"]


def remove(corpus: Path) -> list[str]:
    (corpus / "0/00.flac").unlink()
    return []


def rename(corpus: Path) -> list[str]:
    (corpus / "0/00.flac").rename(corpus / "0/zz.flac")
    return ["0/zz.flac"]


def rewrite(corpus: Path) -> list[str]:
    (corpus / "0/00.flac").write_bytes((corpus / "1/01.flac").read_bytes())
    return ["0/00.flac"]


def touch(corpus: Path) -> list[str]:
    os.utime(corpus / "0/00.flac", ns=(1, 1))
    return ["0/00.flac"]


@pytest.mark.parametrize("change", [add, remove, rename, rewrite, touch])
def test_of_a_changed_folder_what_changed_is_read(
    tmp_path: Path,
    corpus: Path,
    headers_read: list[str],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], list[str]],
) -> None:
    build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    headers_read.clear()
    changed = change(corpus)
    assert find_index(Request(str(corpus)), str(tmp_path / "cache")) is None
    index, _ = build_index(str(corpus), str(tmp_path / "cache"), progress=True)
    assert headers_read == [str(corpus / name) for name in changed]
    said = f"{corpus} has changed: index built again, {len(changed)} of {len(index)} headers read"
    assert said in capsys.readouterr().err
    assert len(list((tmp_path / "cache").iterdir())) == 1
    fresh, _ = build_index(str(corpus), str(tmp_path / "other"), progress=False)
    assert [index.path(row) for row in range(len(index))] == [fresh.path(row) for row in range(len(fresh))]
    np.testing.assert_array_equal(index.num_samples, fresh.num_samples)


def test_rebuilding_on_request_reads_all(tmp_path: Path, corpus: Path, headers_read: list[str]) -> None:
    build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    build_index(str(corpus), str(tmp_path / "cache"), progress=False, rebuild=True)
    assert len(headers_read) == 40


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", None])
def test_a_damaged_cache_is_rebuilt(
    tmp_path: Path, corpus: Path, headers_read: list[str], content: bytes | None
) -> None:
    expected, _ = build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:-100] if content is None else content)
    headers_read.clear()
    index, _ = build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    assert len(headers_read) == 20
    np.testing.assert_array_equal(index.num_samples, expected.num_samples)
    headers_read.clear()
    build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    assert headers_read == []


def test_folders_do_not_share_a_cache(tmp_path: Path, corpus: Path) -> None:
    build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    build_index(str(corpus / "0"), str(tmp_path / "cache"), progress=False)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_relative_and_absolute_folder_share_one(
    tmp_path: Path, corpus: Path, headers_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(str(corpus), str(tmp_path / "cache"), progress=False)
    headers_read.clear()
    monkeypatch.chdir(tmp_path)
    index, _ = build_index("corpus", "cache", progress=False)
    assert headers_read == []
    assert index.root == str(corpus)


def test_progress_goes_to_standard_error(tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_index(str(corpus), str(tmp_path / "cache1"), progress=False)
    assert capfd.readouterr() == ("", "")
    build_index(str(corpus), str(tmp_path / "cache2"), progress=True)
    output = capfd.readouterr()
    assert output.out == ""
    assert "20/20" in output.err


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset_name \(.*missing\) must be an existing folder"):
        build_index(str(tmp_path / "missing"), str(tmp_path / "cache"), progress=False)


def test_folder_without_audio(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"must hold audio files .*; none was found"):
        build_index(str(tmp_path), str(tmp_path / "cache"), progress=False)


def test_folder_of_broken_audio(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    with pytest.raises(DataError, match=r"all 1 found cannot. First: .*a\.wav \(unreadable\)"):
        build_index(str(tmp_path), str(tmp_path / "cache"), progress=False)


def test_filter_keeps_rows_that_are_just_long_enough() -> None:
    kept, num_dropped = filter_by_duration(index_of([0.5, 2.0, 1.99, 30.0]), min_seconds=2.0)
    assert num_dropped == 2
    assert kept.ids.tolist() == [1, 3]
    assert kept.tags.tolist() == [1, 1]
    assert kept.num_samples.tolist() == [32_000, 480_000]


def test_filter_that_leaves_nothing_names_the_longest() -> None:
    with pytest.raises(DataError, match=r"min_duration_in_seconds \(4\.0\) .*\(3\.25 s, of 2 in /corpus\); lower it"):
        filter_by_duration(index_of([0.5, 3.25]), min_seconds=4.0)


@pytest.mark.parametrize(
    ("num_rows", "percentage", "num_validation"),
    [(100, 5, 5), (100, 0, 0), (2, 1, 1), (3, 0.01, 1), (1, 50, 0), (2, 99, 1), (1000, 12.5, 125)],
)
def test_split_sizes(num_rows: int, percentage: float, num_validation: int) -> None:
    train, validation = split_validation(index_of([1.0] * num_rows), percentage, seed=0)
    assert len(validation) == num_validation
    assert sorted([*train.ids, *validation.ids]) == list(range(num_rows))


def test_split_depends_on_the_seed_alone() -> None:
    index = index_of([1.0] * 200)
    draws = [split_validation(index, 10, seed)[1].ids.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(draws[0])
    assert np.mean(draws[0]) == pytest.approx(100, abs=40)


def test_split_hardly_moves_when_rows_are_dropped() -> None:
    index = index_of([1.0] * 150 + [3.0] * 850)
    kept, _ = filter_by_duration(index, 2.0)
    before, after = (set(split_validation(which, 10, seed=0)[1].ids.tolist()) for which in (index, kept))
    assert len(after - before) < 25
