"""A rank that is stopped in the middle of training: the other one ends by itself, or at once when it is told to."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.integration.ranks import kill, metrics, start_ranks, wait

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parents[1] / "corpus"
HANG_SECONDS = 5
START_LIMIT_SECONDS = 120.0


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[ForkServerProcess]]:
    """Two ranks in the middle of training, the second of which no longer runs."""
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted((CORPUS / "train").rglob("*.opus"))[::16]:
        shutil.copy(path, data)
    arguments = [
        "pretrain", "--config=demo", "--max_train_steps=100000", "--logging_steps=1", "--saving_steps=100000",
        "--per_device_train_batch_size=2", "--max_batch_seconds=4", "--deepspeed=zero2", f"--dataset_name={data}",
        f"--hang_timeout_seconds={HANG_SECONDS}", f"--cache_dir={tmp_path / 'cache'}",
        f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    started = start_ranks(arguments, tmp_path / "log")
    try:
        deadline = time.monotonic() + START_LIMIT_SECONDS
        while len(metrics(tmp_path / "run")) < 3:
            assert time.monotonic() < deadline and started[0].is_alive(), (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.05)
        _send(started[1], signal.SIGSTOP)
        yield started
    finally:
        kill(started)


def _send(rank: ForkServerProcess, number: int) -> None:
    assert rank.pid is not None
    os.kill(rank.pid, number)


def test_a_rank_that_waits_for_a_hung_one_ends_in_the_stated_time(
    ranks: list[ForkServerProcess], tmp_path: Path
) -> None:
    start = time.monotonic()
    ranks[0].join(HANG_SECONDS + 15)
    text = (tmp_path / "log").read_text(errors="replace")
    assert ranks[0].exitcode == 1, text[-4000:]
    assert HANG_SECONDS - 1 <= time.monotonic() - start < HANG_SECONDS + 10
    assert f"error on rank 0: update {metrics(tmp_path / 'run')[-1]['step'] + 1} took longer than 5 s" in text
    assert "trainer/run/loop.py" in text  # where it stood
    _send(ranks[1], signal.SIGCONT)
    assert wait(ranks, 30) == [1, 1]  # awake again, it finds itself alone


def test_a_second_signal_ends_a_rank_that_waits_for_a_hung_one(ranks: list[ForkServerProcess]) -> None:
    time.sleep(1.0)  # until it waits, where Python runs no signal handlers
    _send(ranks[0], signal.SIGINT)
    time.sleep(0.5)
    assert ranks[0].is_alive()
    _send(ranks[0], signal.SIGINT)
    ranks[0].join(2)
    assert ranks[0].exitcode == 128 + signal.SIGINT
