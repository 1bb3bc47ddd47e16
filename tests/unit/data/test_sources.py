import io
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from trainer.data import sources
from trainer.data.audio import decode, read_num_samples
from trainer.data.index import AudioIndex, build_index, concatenate
from trainer.data.rows import DataError, Request, Skipped
from trainer.data.sources import open_source

WriteAudio = Callable[..., Path]


def find_audio_files(folder: str) -> list[str]:
    return [stamp.path for stamp in sources.find_audio_files(folder)]


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


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.wav", tmp_path / "closed/b.wav")
    real = os.scandir

    def refuse(path: str) -> Any:  # root may read everything
        if path.rstrip("/").endswith("closed"):
            raise PermissionError(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_audio_files(str(tmp_path)) == ["a.wav", "closed/"]
    rows = open_source(Request(str(tmp_path))).read().rows
    assert [row.reason for row in rows] == [None, "folder cannot be read"]


def index_of(name: Path | str, tmp_path: Path, **options: str | None) -> tuple[AudioIndex, list[Skipped]]:
    return build_index(Request(str(name), **options), str(tmp_path / "cache"), progress=False)  # type: ignore[arg-type]


def decodes_as(index: AudioIndex, files: list[Path]) -> None:
    """Each row is one of the files, in order; a crop of it too."""
    assert len(index) == len(files)
    for row, file in enumerate(files):
        num_samples = read_num_samples(str(file))
        assert index.num_samples[row] == num_samples
        expected = decode(str(file), num_samples // 2, 500)
        np.testing.assert_array_equal(decode(index.place(row), num_samples // 2, 500), expected)


@pytest.fixture
def manifest(tmp_path: Path, corpus: Path) -> Path:
    """Every file of the corpus, the longest first, as fairseq's script writes it; languages in a third column."""
    files = sorted(corpus.rglob("*.flac"), key=lambda path: path.name, reverse=True)
    lines = [f"{file.relative_to(corpus)}\t{soundfile.info(file).frames}" for file in files]
    path = tmp_path / "train.tsv"
    path.write_text("\n".join([str(corpus), *lines]) + "\n")
    return path


def test_a_manifest_keeps_its_order(tmp_path: Path, corpus: Path, manifest: Path) -> None:
    index, skipped = index_of(manifest, tmp_path)
    assert skipped == []
    decodes_as(index, sorted(corpus.rglob("*.flac"), key=lambda path: path.name, reverse=True))
    assert index.tag_names == ["train"] and set(index.tags) == {0}


def test_a_manifest_with_languages(tmp_path: Path, manifest: Path) -> None:
    root, *lines = manifest.read_text().splitlines()
    languages = ["de", "en", ""]
    lines = [f"{line}\t{languages[number % 3]}" for number, line in enumerate(lines)]
    manifest.write_text("\n".join([root, *lines]))
    index, _ = index_of(manifest, tmp_path)
    assert index.tag_names == ["de", "en", "train"]
    assert index.tags[:6].tolist() == [0, 1, 2, 0, 1, 2]


def test_a_manifest_names_what_is_missing(tmp_path: Path, corpus: Path, manifest: Path) -> None:
    (corpus / "0/00.flac").unlink()
    index, skipped = index_of(manifest, tmp_path)
    assert len(index) == 19
    assert skipped == [Skipped(str(corpus / "0/00.flac"), "missing")]


def test_a_manifest_of_a_zip(tmp_path: Path, corpus: Path) -> None:
    files = sorted(corpus.rglob("*.flac"))[:3]
    with zipfile.ZipFile(tmp_path / "audio.zip", "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, file.name)
        places = [(info.header_offset + 30 + len(info.filename), info.file_size) for info in archive.infolist()]
    lines = [f"audio.zip:{offset}:{size}\t1" for offset, size in places]
    (tmp_path / "zip.tsv").write_text("\n".join([str(tmp_path), *lines, "audio.zip:5:100\t1"]))
    index, skipped = index_of(tmp_path / "zip.tsv", tmp_path)
    decodes_as(index, files)
    assert index.path(0) == f"{tmp_path}/audio.zip:{places[0][0]}:{places[0][1]}"
    assert [item.reason for item in skipped] == ["unreadable"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name an existing folder in its first line, not ''"),
        ("/no/such\na.wav\t1\n", "not '/no/such'"),
        ("{root}\n\n", "it lists none"),
        ("{root}\na.wav\n", "line 2 is 'a.wav'"),
        ("{root}\na.wav\t1\nb.wav\tlong\n", "line 3 is"),
        ("{root}\na.wav\t1\tde\tx\n", "line 2 is"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.tsv").write_text(text.format(root=tmp_path))
    with pytest.raises(DataError, match=re.escape(message)):
        index_of(tmp_path / "m.tsv", tmp_path)


def test_a_manifest_with_odd_names(tmp_path: Path, corpus: Path) -> None:
    """A line that is no path, a range beyond 64 bits and headerless audio are left out like any other file."""
    (tmp_path / "x.raw").write_bytes(bytes(range(256)) * 100)
    odd = ["a\0b.wav", "a\0b.zip:1:2", f"a.zip:{10**20}:5", f"a.zip:5:{10**20}", f"{tmp_path}/x.raw"]
    (tmp_path / "m.tsv").write_text("\n".join([str(corpus), "0/00.flac\t1", *(f"{name}\t1" for name in odd)]))
    index, skipped = index_of(tmp_path / "m.tsv", tmp_path)
    assert len(index) == 1
    zero = "zero byte in file name"
    assert [item.reason for item in skipped] == [zero, zero, "missing", "missing", "unreadable"]


@pytest.mark.parametrize("relative", [False, True])
def test_a_manifest_of_another_root(
    tmp_path: Path, write_audio: WriteAudio, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    """Neither the lengths nor the place of the files that had these names under the root before."""
    for seconds in (1, 2):
        root = write_audio(f"{seconds}/a.wav", seconds).parent
        monkeypatch.chdir(root)
        if not relative or seconds == 1:
            (tmp_path / "m.tsv").write_text(f"{'.' if relative else root}\na.wav\t16000\n")
        index, _ = index_of(tmp_path / "m.tsv", tmp_path)
        assert (index.path(0), index.num_samples.tolist()) == (str(root / "a.wav"), [seconds * 16_000])


def write_tar(path: Path, files: list[Path], long_names: bool = False) -> None:
    with tarfile.open(path, "w") as archive:
        for file in files:
            name = f"{'x' * 150 if long_names else 'a'}/{file.name}"
            archive.add(file, name)
            text = tarfile.TarInfo(name.replace(".flac", ".txt"))
            text.size = 5
            archive.addfile(text, io.BytesIO(b"words"))


@pytest.fixture
def shards(tmp_path: Path, corpus: Path) -> list[Path]:
    """The files of the corpus in two shards, `shards/*.tar`; returns them in order."""
    files = sorted(corpus.rglob("*.flac"))
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/00.tar", files[:12])
    write_tar(tmp_path / "shards/01.tar", files[12:], long_names=True)
    return files


def test_tar_shards_by_folder_and_by_pattern(tmp_path: Path, shards: list[Path]) -> None:
    index, skipped = index_of(tmp_path / "shards", tmp_path)
    assert skipped == []
    decodes_as(index, shards)
    assert index.path(0) == f"{tmp_path}/shards/00.tar:a/{shards[0].name}"
    decodes_as(index_of(tmp_path / "shards/*.tar", tmp_path)[0], shards)
    decodes_as(index_of(tmp_path / "shards/01.tar", tmp_path)[0], shards[12:])


def test_a_shard_that_is_cut_loses_its_end(tmp_path: Path, shards: list[Path]) -> None:
    path = tmp_path / "shards/01.tar"
    with tarfile.open(path) as archive:
        member = [each for each in archive if each.name.endswith(".flac")][3]
    path.write_bytes(path.read_bytes()[: member.offset_data + 100])
    index, skipped = index_of(tmp_path / "shards", tmp_path)
    decodes_as(index, shards[:15])
    assert "truncated or damaged" in [item.reason for item in skipped]


def test_a_shard_that_is_no_tar(tmp_path: Path, shards: list[Path]) -> None:
    (tmp_path / "shards/02.tar").write_text("words" * 1000)
    index, skipped = index_of(tmp_path / "shards", tmp_path)
    assert len(index) == 20
    assert [(item.path.rpartition("/")[2], item.reason) for item in skipped] == [
        ("02.tar:(rest of the shard)", "damaged tar file")
    ]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-512, -1024, -(2**70), 2**40, 2**63, 2**70])
def test_a_shard_with_an_impossible_size(tmp_path: Path, corpus: Path, kind: bytes, size: int) -> None:
    write_tar(tmp_path / "a.tar", [corpus / "0/00.flac"])
    header = tarfile.TarInfo("b.flac")
    header.type = kind
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 2**88).to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % (8 * ord(" ") + sum(block[:148]) + sum(block[156:]))
    content = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512)
    (tmp_path / "a.tar").write_bytes(content + block + bytes(4096))
    index, skipped = index_of(tmp_path / "a.tar", tmp_path)
    assert len(index) == 1
    assert {item.reason for item in skipped} <= {"truncated or damaged", "damaged tar file"} and skipped


def test_a_shard_without_audio(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    write_tar(tmp_path / "text.tar", [tmp_path / "a.txt"])
    with pytest.raises(DataError, match="must hold audio; there is none in it"):
        index_of(tmp_path / "text.tar", tmp_path)


def test_a_changed_shard_is_read_again(tmp_path: Path, shards: list[Path]) -> None:
    index_of(tmp_path / "shards", tmp_path)
    write_tar(tmp_path / "shards/01.tar", shards[:3])
    decodes_as(index_of(tmp_path / "shards", tmp_path)[0], shards[:12] + shards[:3])


def test_workers_read_the_index_that_was_opened(tmp_path: Path, shards: list[Path]) -> None:
    index, _ = index_of(tmp_path / "shards", tmp_path)
    packed = pickle.dumps(index)
    (cache,) = (tmp_path / "cache").iterdir()
    cache.unlink()  # as by a run that builds it again
    decodes_as(pickle.loads(packed), shards)


def test_several_sources(tmp_path: Path, corpus: Path, manifest: Path, shards: list[Path]) -> None:
    manifest.write_text(manifest.read_text().replace("\n", "\tde\n").replace("\tde", "", 1))
    names = [corpus, manifest, tmp_path / "shards", corpus / "0", tmp_path / "shards/00.tar"]
    index = concatenate([index_of(name, tmp_path)[0] for name in names])
    assert index.ids.tolist() == list(range(20 + 20 + 20 + 7 + 12))
    assert index.tag_names == ["corpus", "train/de", "shards", "0", "00"]
    assert index.tag_sources == [0, 1, 2, 3, 4]
    assert np.bincount(index.tags).tolist() == [20, 20, 20, 7, 12]
    assert index.path(20 + 20) == f"{tmp_path}/shards/00.tar:a/{shards[0].name}"
    some = index.take(np.array([66, 3, 41]))
    assert [some.path(row) for row in range(3)] == [index.path(row) for row in (66, 3, 41)]
    assert some.tags.tolist() == [3, 0, 2]
    same = concatenate([index_of(corpus, tmp_path)[0]] * 2)
    assert same.tag_names == ["corpus", "corpus (2)"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.tsv", "must be an existing folder"),
        ("no/such/folder", "must be an existing folder"),
        ("*.tar", "must be an existing folder"),
        ("notes.txt", "this file is none of them"),
        ("a.tar.gz", "must be an uncompressed tar file"),
        ("empty", "none was found"),
    ],
)
def test_a_name_that_stands_for_nothing(tmp_path: Path, name: str, message: str) -> None:
    touch(tmp_path / "notes.txt", tmp_path / "a.tar.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_source(Request(str(tmp_path / name)))


def test_parts_of_what_has_none(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(DataError, match=r"dataset_split_names \(test\) is for data sets .* a manifest"):
        index_of(manifest, tmp_path, split="test")


def test_a_split_of_a_folder_that_has_none(tmp_path: Path, corpus: Path) -> None:
    (corpus / "notes.zip").write_text("no zip")
    with pytest.raises(DataError, match=r"dataset_split_names \(train\) must be a subfolder of .*not a zip file"):
        open_source(Request(str(corpus), split="train", cache_dir=str(tmp_path / "cache")))


def test_a_pattern_of_manifests(tmp_path: Path, manifest: Path) -> None:
    assert len(index_of(tmp_path / "tr*.tsv", tmp_path)[0]) == 20
    (tmp_path / "train2.tsv").write_text(manifest.read_text())
    with pytest.raises(DataError, match="must be one manifest, not 2; name each"):
        index_of(tmp_path / "tr*.tsv", tmp_path)


def test_a_split_of_a_folder_is_a_subfolder(tmp_path: Path, corpus: Path) -> None:
    decodes_as(index_of(corpus, tmp_path, split="1")[0], sorted((corpus / "1").iterdir()))
