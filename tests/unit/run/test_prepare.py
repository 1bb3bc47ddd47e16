"""`trainer prepare` as it is called, but for the process around it."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainer.cli import main

REPOSITORY = Path(__file__).parents[3]
SPEECH = REPOSITORY / "tests" / "corpus" / "validation"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Noise of 1, 2, ... 10 s and a file that is none."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for seconds in range(1, 11):
        soundfile.write(tmp_path / f"data/{seconds}.flac", 0.1 * rng.standard_normal(16_000 * seconds), 16_000)
    (tmp_path / "data" / "not.wav").write_text("words")
    return tmp_path / "data"


def prepare(*flags: object, cache: Path) -> int:
    return main(["prepare", f"--cache_dir={cache}", *map(str, flags)])


def test_too_many_files_that_cannot_be_used(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("--dataset_name", data, cache=tmp_path / "c") == 2
    said = capsys.readouterr().err
    assert "max_skipped_fraction (0.01) must not be exceeded: 1 of 11 files of dataset_name cannot be used" in said
    assert "(unreadable: 1)" in said
    (listed,) = (tmp_path / "c").rglob("skipped.tsv")
    assert str(listed) in said
    assert listed.read_text() == f"{data}/not.wav\tunreadable\n"
    assert prepare("--dataset_name", data, "--max_skipped_fraction=0.1", cache=tmp_path / "c") == 0
    said = capsys.readouterr().err
    assert str(listed) in said and "1 files skipped (unreadable: 1)" in said


def test_pretrain_stops_for_the_same_reason(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config=demo", f"--dataset_name={data}", f"--output_dir={tmp_path / 'run'}", f"--cache_dir={tmp_path}"]
    assert main(["pretrain", *flags]) == 2
    assert "max_skipped_fraction (0.01)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_stats(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{seconds}.flac\t1\t{'de' if seconds > 7 else 'en'}" for seconds in range(1, 11)]
    (tmp_path / "m.tsv").write_text("\n".join([str(data), *lines]))
    flags = ["--dataset_name", tmp_path / "m.tsv", SPEECH]
    assert prepare(*flags, "--stats", cache=tmp_path / "c") == 0
    output = capsys.readouterr().out
    index_hours = 55 / 3600
    assert f"{10 + len(list(SPEECH.rglob('*.opus')))} utterances" in output
    table = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith(("m/", "valid"))}
    assert set(table) == {"m/de", "m/en", "validation"}
    assert table["m/de"][0] == "3" and table["m/en"][0] == "7"
    assert float(table["m/de"][1]) == pytest.approx(index_hours * 27 / 55, abs=0.006)
    shares = [float(row[2].rstrip("%")) for row in table.values()]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    histogram = [line for line in output.splitlines() if " - " in line and " s " in line]
    assert histogram[0].split()[:3] == ["1", "-", "2"]
    assert sum(int(line.split()[4]) for line in histogram) == 10 + len(list(SPEECH.rglob("*.opus")))


def test_stats_are_for_preparation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config=demo", "--dataset_name=a", f"--output_dir={tmp_path / 'r'}", "--stats"]) == 2
    assert "use trainer prepare --stats" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_config_names", "a", "b", "--dataset_split_names", "c"], "must be as many as dataset_split_names"),
        (["--dataset_split_names", "c", "--dataset_name", "x", "y"], "NAME:CONFIG:SPLIT"),
        (["--max_skipped_fraction=2"], "max_skipped_fraction (2.0) must be from 0 to 1"),
        (["--preprocessing_num_workers=0"], "preprocessing_num_workers (0) must be greater than 0"),
        (["--dataset_name", str(SPEECH), ""], "dataset_name is empty"),
        (["--dataset_name", str(SPEECH), "no/such/folder"], "dataset_name (no/such/folder) must be an existing"),
        (["--dataset_name", f"{SPEECH}:dev"], "cannot be loaded by `datasets`: BuilderConfig 'dev' not found"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    name = [] if "--dataset_name" in flags else ["--dataset_name", str(SPEECH)]
    assert prepare(*name, *flags, cache=tmp_path / "c") == 2
    assert message in capsys.readouterr().err


def test_names_of_cache_files_are_taken_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset_name", SPEECH, "--train_cache_file_name=t.arrow", "--preprocessing_num_workers=2"]
    assert prepare(*flags, "--min_duration_in_seconds=1", cache=tmp_path / "c") == 0
    assert "train_cache_file_name is not used" in capsys.readouterr().err


def test_a_second_process_waits_and_says_so(tmp_path: Path) -> None:
    cache = tmp_path / "c" / "audio-index"
    cache.mkdir(parents=True)
    command = [
        sys.executable, "-m", "trainer", "prepare", "--dataset_name", str(SPEECH), f"--cache_dir={tmp_path / 'c'}",
        "--min_duration_in_seconds=1",
    ]  # fmt: skip
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"waiting for another process that is building an index in {cache}" in line
        assert process.poll() is None and list(cache.glob("*.arrow")) == []
    assert process.wait(timeout=60) == 0
    process.stderr.close()


def test_overwriting_reads_again_but_once_for_all_ranks(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--dataset_name", data, "--max_skipped_fraction=0.1", "--overwrite_cache"]
    monkeypatch.setattr("trainer.run.corpus._STARTED", time.time() + 100)
    assert prepare(*flags, cache=tmp_path / "c") == 0
    (index,) = (tmp_path / "c").rglob("*.arrow")
    before = index.stat().st_mtime_ns
    assert prepare(*flags, cache=tmp_path / "c") == 0
    assert index.stat().st_mtime_ns != before
    os.utime(index, (time.time() + 200,) * 2)  # as another rank of this start has left it
    before = index.stat().st_mtime_ns
    assert prepare(*flags, cache=tmp_path / "c") == 0
    assert index.stat().st_mtime_ns == before


def test_a_cache_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c").write_text("a file")
    assert prepare("--dataset_name", SPEECH, cache=tmp_path / "c") == 2
    assert "cannot be written" in capsys.readouterr().err
