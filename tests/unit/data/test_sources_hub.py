"""Hugging Face data sets, written and read here without torchcodec."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.audio import decode, read_num_samples
from trainer.data.index import AudioIndex, build_index, find_index
from trainer.data.rows import DataError, Request, Skipped

README = """---
configs:
- config_name: clean
  data_files:
  - {split: validation, path: clean/validation-*.parquet}
  - {split: test, path: clean/test-*.parquet}
- config_name: other
  data_files: other/*.parquet
---
"""


@pytest.fixture(autouse=True)
def no_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.encoders", None)


def files_of(corpus: Path) -> list[Path]:
    return sorted(corpus.rglob("*.flac"), key=lambda path: path.name)


def rows_of(files: list[Path]) -> dict[str, Any]:
    """What an ``Audio`` column stores, with two columns that name the language."""
    return {
        "audio": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "language": ["de" if number % 2 else "en" for number in range(len(files))],
        "class": [number % 2 for number in range(len(files))],
    }


def saved(files: list[Path]) -> Any:
    import datasets

    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "language": datasets.Value("string"),
            "class": datasets.ClassLabel(names=["en", "de"]),
        }
    )
    dataset = datasets.Dataset.from_dict(rows_of(files), features=features)
    return dataset.cast_column("audio", datasets.Audio(decode=False))


@pytest.fixture
def repository(tmp_path: Path, corpus: Path) -> Path:
    """Laid out as on the Hub: two configurations, the first with two splits."""
    files = files_of(corpus)
    parts = {"clean/validation-0": files[:6], "clean/test-0": files[6:10], "other/train": files[10:12]}
    for name, some in parts.items():
        path = tmp_path / "repository" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        saved(some).to_parquet(path)
    (tmp_path / "repository" / "README.md").write_text(README)
    return tmp_path / "repository"


def index_of(name: Path | str, tmp_path: Path, **options: str) -> tuple[AudioIndex, list[Skipped]]:
    request = Request(str(name), cache_dir=str(tmp_path / "datasets"), **options)
    built = build_index(request, str(tmp_path / "cache"), progress=False)
    found = find_index(request, str(tmp_path / "cache"))
    assert found is not None and found[0].num_samples.tolist() == built[0].num_samples.tolist()
    return built


def decodes_as(index: AudioIndex, files: list[Path]) -> None:
    assert len(index) == len(files)
    for row, file in enumerate(files):
        num_samples = read_num_samples(str(file))
        assert index.num_samples[row] == num_samples
        np.testing.assert_array_equal(decode(index.place(row), 100, 500), decode(str(file), 100, 500))


def test_saved_to_disk(tmp_path: Path, corpus: Path) -> None:
    import datasets

    files = files_of(corpus)
    both = datasets.DatasetDict({"train": saved(files[:8]), "validation": saved(files[8:11])})
    both.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "validation": 1})
    index, skipped = index_of(tmp_path / "saved", tmp_path)
    assert skipped == []
    decodes_as(index, files[:8])
    assert index.path(0).endswith(f".arrow:{files[0].name}")
    decodes_as(index_of(tmp_path / "saved", tmp_path, split="validation")[0], files[8:11])
    decodes_as(index_of(tmp_path / "saved" / "validation", tmp_path)[0], files[8:11])
    with pytest.raises(DataError, match=r"dataset_split_names \(test\) .* there are train, validation"):
        index_of(tmp_path / "saved", tmp_path, split="test")
    with pytest.raises(DataError, match=r"audio_column_name \(sound\) .* there are audio, language, class"):
        index_of(tmp_path / "saved", tmp_path, audio_column="sound")
    with pytest.raises(DataError, match=r"language_column_name \(tongue\) .* there are audio, language, class"):
        index_of(tmp_path / "saved", tmp_path, language_column="tongue")
    with pytest.raises(DataError, match=r"audio_column_name \(class\) must be a column of audio"):
        index_of(tmp_path / "saved", tmp_path, audio_column="class")


@pytest.mark.parametrize("column", ["language", "class"])
def test_languages(tmp_path: Path, corpus: Path, column: str) -> None:
    saved(files_of(corpus)[:5]).save_to_disk(tmp_path / "saved")
    index, _ = index_of(tmp_path / "saved", tmp_path, language_column=column)
    assert index.tag_names == ["de", "en"]
    assert index.tags.tolist() == [1, 0, 1, 0, 1]


def test_configurations_and_splits(tmp_path: Path, corpus: Path, repository: Path) -> None:
    files = files_of(corpus)
    index, _ = index_of(repository, tmp_path, config="clean", split="validation")
    decodes_as(index, files[:6])
    assert index.tag_names == ["clean:validation"]
    decodes_as(index_of(repository, tmp_path, config="clean", split="test[1:]")[0], files[7:10])
    mixed, _ = index_of(repository, tmp_path, config="clean", split="test[-50%:]+validation[:2]+test[:1]")
    decodes_as(mixed, [*files[8:10], *files[:2], files[6]])
    decodes_as(index_of(repository, tmp_path, config="other")[0], files[10:12])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "nosuch"}, r"'nosuch' not found. Available: \['clean', 'other'\]"),
        ({"config": "clean"}, r"dataset_split_names \(not set\) must name a split .* there are validation, test"),
        ({"config": "clean", "split": "dev"}, r"dataset_split_names \(dev\) .* there are validation, test"),
        ({"config": "clean", "split": "test[a:b]"}, r"dataset_split_names \(test\[a:b\]\)"),
    ],
)
def test_parts_that_are_not_there(tmp_path: Path, repository: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        index_of(repository, tmp_path, **options)


def test_parquet(tmp_path: Path, corpus: Path, repository: Path) -> None:
    files = files_of(corpus)
    decodes_as(index_of(repository / "clean" / "test-0.parquet", tmp_path)[0], files[6:10])
    decodes_as(index_of(repository / "*" / "t*.parquet", tmp_path)[0], files[6:12])
    decodes_as(index_of(repository, tmp_path)[0], [*files[6:10], *files[:6], *files[10:12]])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string()])
def test_parquet_of_plain_bytes_or_paths(tmp_path: Path, corpus: Path, kind: pa.DataType) -> None:
    files = files_of(corpus)[:4]
    values = [str(file) if kind == pa.string() else file.read_bytes() for file in files]
    table = pa.table({"sound": pa.array([*values[:2], None, *values[2:]], kind)})
    pq.write_table(table, tmp_path / "plain.parquet")
    index, skipped = index_of(tmp_path / "plain.parquet", tmp_path, audio_column="sound")
    decodes_as(index, files)
    assert [item.reason for item in skipped] == ["no audio in the row"]


def test_split_of_audiofolder_that_is_not_there(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"dataset_split_names \(dev\) must be a subfolder of .* with audio"):
        index_of(corpus, tmp_path, split="dev")


def test_a_hub_data_set_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset_name \(owner/speech\) (is neither|cannot be loaded)"):
        index_of("owner/speech", tmp_path)


def test_arrow_files_that_are_damaged_or_gone(tmp_path: Path, corpus: Path) -> None:
    saved(files_of(corpus)[:4]).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"words" * 100)
    with pytest.raises(DataError, match="is not an Arrow file"):
        index_of(tmp_path / "saved", tmp_path)
    arrow.unlink()
    with pytest.raises(DataError, match="lacks its file"):
        index_of(tmp_path / "saved", tmp_path)
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        index_of(tmp_path / "saved", tmp_path)
