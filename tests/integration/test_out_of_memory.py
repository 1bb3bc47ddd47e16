"""Memory that runs out under the real program: a limit on the address space of its processes."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.ranks import kill, start_ranks, wait

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SPEECH = REPOSITORY / "tests" / "corpus" / "train"


def _arguments(run: Path, batch_seconds: int) -> list[str]:
    return [
        "pretrain", "--config=demo", f"--dataset_name={SPEECH}", f"--output_dir={run}", "--num_workers=0",
        f"--cache_dir={run.parent / 'cache'}", f"--max_batch_seconds={batch_seconds}", "--max_train_steps=1000",
        "--num_warmup_steps=1", "--per_device_train_batch_size=1000", "--logging_steps=1", "--saving_steps=1",
        "--validation_split_percentage=0",
    ]  # fmt: skip


def _address_space(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def test_one_process_ends_with_the_numbers_and_the_flag(tmp_path: Path) -> None:
    """At most 3.2 GB of address space, of which torch takes half; 900 s of audio need more, 4 s do not."""

    def run(batch_seconds: int, *flags: str) -> subprocess.CompletedProcess[str]:
        limits = f'ulimit -v {3_200_000}; exec "$@"'
        command = [sys.executable, "-m", "trainer", *_arguments(tmp_path / f"{batch_seconds}", batch_seconds), *flags]
        return subprocess.run(
            ["bash", "-c", limits, "bash", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}, timeout=240,
        )  # fmt: skip

    small = run(4, "--max_train_steps=1")
    assert small.returncode == 0, small.stderr[-4000:]
    large = run(900)
    assert large.returncode == 3, large.stderr[-4000:]
    assert "Traceback" not in large.stderr
    lines = [line.removeprefix("trainer: error: ") for line in large.stderr.splitlines() if "trainer: error" in line]
    assert "out of memory" in lines[0] and "allocate" in lines[0]
    assert [line.split()[:2] for line in lines if line.startswith("plain")] == [["plain", "no"], ["plain", "yes"]]
    assert lines[-1].startswith("to change: lower --max_batch_seconds (900); add --gradient_checkpointing;")


def test_one_of_two_ranks_without_memory_ends_both(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks = start_ranks([*_arguments(tmp_path / "run", 300), "--deepspeed=zero2"], log)
    try:
        while "training 0.7 M parameters" not in log.read_text(errors="replace"):
            assert all(process.exitcode is None for process in ranks), log.read_text(errors="replace")[-4000:]
            time.sleep(0.01)
        pid = ranks[1].pid
        assert pid is not None
        limit = _address_space(pid) + (100 << 20)  # a tenth of what its first micro-batch takes
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        codes = wait(ranks, 120)
    finally:
        kill(ranks)
    text = log.read_text(errors="replace")
    assert codes == [1, 3], text[-4000:]
    assert "error on rank 1: out of memory" in text
    assert "error on rank 1: to change: lower --max_batch_seconds (300)" in text
