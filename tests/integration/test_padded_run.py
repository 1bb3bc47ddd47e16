"""Padded batches of balanced sources in the real program: on one rank, resumed on two, the losses stay the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "tests" / "corpus" / "train"
BIN = Path(sys.executable).parent
FLAGS = [
    "--config=demo", "--no_crop", "--pad_to_multiple_of=320", "--sampling_alpha=0.5", "--max_duration_in_seconds=6",
    "--one_crop_per_utterance=false", "--max_batch_seconds=16", "--per_device_train_batch_size=4", "--num_workers=1",
    "--max_train_steps=4", "--num_warmup_steps=1", "--logging_steps=1", "--eval_steps=4", "--saving_steps=2",
    "--global_diversity=false",  # a statistic of a micro-batch, however they are split over ranks
]  # fmt: skip


def _train(start: list[str], run: Path, cache: Path, *flags: str) -> list[dict[str, Any]]:
    command = [
        *start, "-m", "trainer", "pretrain", *FLAGS, f"--output_dir={run}", f"--cache_dir={cache}", *flags,
        "--dataset_name", str(TRAIN / "de-f3"), str(TRAIN / "it-m5"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_padded_batches_on_one_rank_and_on_two(tmp_path: Path) -> None:
    alone = _train(
        [sys.executable], tmp_path / "alone", tmp_path / "cache", "--gradient_accumulation_steps=2"
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    checkpoint = tmp_path / "alone" / "checkpoints" / "step-00000002"
    ranks = _train(
        [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={port}"],
        tmp_path / "ranks", tmp_path / "cache", "--gradient_accumulation_steps=1", f"--resume={checkpoint}",
    )  # fmt: skip
    for line in (line for line in ranks if line["step"] > 2):
        (same,) = [other for other in alone if (other["step"], other["split"]) == (line["step"], line["split"])]
        for key in ("loss", "contrastive_loss", "num_targets", "audio_seconds", "accuracy"):
            assert line[key] == pytest.approx(same[key], rel=1e-4), (line["step"], line["split"], key)
    assert {(line["step"], line["split"]) for line in ranks} >= {(3, "train"), (4, "train"), (4, "validation")}
