from pathlib import Path

import pytest

from trainer.data.sources import find_audio_files


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_depth_suffixes_case_and_order(tmp_path: Path) -> None:
    names = ["b.WAV", "a/z.flac", "a.b/c/d.Mp3", "a/é x.opus", "c.ogg", "Z.aiff"]
    touch(*(tmp_path / name for name in names), tmp_path / "a.txt", tmp_path / "wav", tmp_path / "a/x.flac.json")
    assert find_audio_files(str(tmp_path)) == sorted(names)


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a.wav", tmp_path / "._a.wav", tmp_path / ".cache/b.wav")
    assert find_audio_files(str(tmp_path)) == ["a.wav"]


def test_a_hidden_root_is_searched(tmp_path: Path) -> None:
    touch(tmp_path / ".corpus/a.wav")
    assert find_audio_files(str(tmp_path / ".corpus")) == ["a.wav"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere/a.wav", tmp_path / "corpus/b.wav")
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "corpus")
    assert find_audio_files(str(tmp_path / "corpus")) == ["again/a.wav", "b.wav"]


def test_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "corpus/a/b.wav")
    monkeypatch.chdir(tmp_path)
    assert find_audio_files("corpus/") == ["a/b.wav"]
