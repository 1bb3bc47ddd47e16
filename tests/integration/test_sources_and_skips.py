"""Two ranks train on four kinds of source at once, until too much of the audio turns out to be unusable."""

import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

REPOSITORY = Path(__file__).parents[2]
CORPUS = REPOSITORY / "tests" / "corpus"
NUM_FILES = 12  # of each source


def _write_sources(folder: Path) -> list[Path]:
    """A manifest, a tar shard, a saved data set, and a folder whose two files are silent, as only decoding shows."""
    files = sorted((CORPUS / "train").rglob("*.opus"))
    listed, archived, saved = (files[first : first + NUM_FILES] for first in range(0, 3 * NUM_FILES, NUM_FILES))
    lines = [f"{file.relative_to(CORPUS)}\t1\tde" for file in listed]
    (folder / "listed.tsv").write_text("\n".join([str(CORPUS), *lines]))
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for file in archived:
            archive.add(file, file.name)
    column = {"audio": [{"bytes": file.read_bytes(), "path": file.name} for file in saved]}
    features = datasets.Features({"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    datasets.Dataset.from_dict(column, features=features).save_to_disk(folder / "saved")
    (folder / "silent").mkdir()
    for number in range(2):
        soundfile.write(folder / "silent" / f"{number}.flac", np.zeros(80_000), 16_000)
    return [folder / name for name in ("listed.tsv", "shard.tar", "saved", "silent")]


@pytest.mark.slow
def test_training_on_many_sources_stops_when_too_much_is_broken(tmp_path: Path) -> None:
    sources = _write_sources(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", f"--master_port={port}",
        "-m", "trainer", "pretrain", "--config=demo", "--dataset_name", *map(str, sources),
        f"--validation_dataset_name={CORPUS / 'validation'}", f"--output_dir={tmp_path / 'run'}",
        f"--cache_dir={tmp_path / 'cache'}", "--max_train_steps=60", "--num_warmup_steps=4", "--logging_steps=1",
        "--saving_steps=100", "--eval_steps=100", "--per_device_train_batch_size=2", "--max_batch_seconds=4",
        "--num_workers=1", "--max_skipped_fraction=0.02",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    # 2 % of these files and those to validate on is between one and two.
    assert "2 files could not be used, more than max_skipped_fraction allows (1)" in result.stderr, result.stderr
    assert result.stderr.count("max_skipped_fraction allows") == 1
    assert "exitcode  : 3" in result.stderr
    assert str(REPOSITORY / "trainer") not in result.stderr  # no traceback but the launcher's
    listed = (tmp_path / "run" / "skipped.tsv").read_text().splitlines()
    assert sorted(listed) == [f"{tmp_path}/silent/{number}.flac\tsilent" for number in range(2)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines and all(line["num_targets"] > 0 for line in lines)
