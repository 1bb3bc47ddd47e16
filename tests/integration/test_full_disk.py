"""A disk that runs full under two training ranks, and a checkpoint that a disk has damaged."""

import contextlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.integration.ranks import kill, metrics, start_ranks, wait
from trainer.run.manifest import find_damage

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parents[1] / "corpus"
LIMIT_SECONDS = 120.0
# From the failure to the end of all ranks.
END_SECONDS = 15.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for path in sorted((CORPUS / "train").rglob("*.opus"))[::8]:
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Iterator[Callable[..., list[ForkServerProcess]]]:
    """Starts two ranks; they are gone at the end of the test."""
    started: list[ForkServerProcess] = []

    def start(run: Path, num_updates: int, *flags: str) -> list[ForkServerProcess]:
        arguments = [
            "pretrain", "--config=demo", f"--max_train_steps={num_updates}", "--num_warmup_steps=4",
            "--lr_scheduler_type=constant_with_warmup", "--logging_steps=1", "--eval_steps=100", "--saving_steps=2",
            "--save_total_limit=10", "--per_device_train_batch_size=2", "--max_batch_seconds=4", "--deepspeed=zero2",
            f"--dataset_name={data}", "--validation_split_percentage=0", f"--cache_dir={tmp_path / 'cache'}",
            f"--output_dir={run}", *flags,
        ]  # fmt: skip
        ranks = start_ranks(arguments, tmp_path / "log")
        started.extend(ranks)
        return ranks

    yield start
    kill(started)


def _complaints(log: Path) -> list[str]:
    text = log.read_text(errors="replace")
    assert "Traceback" not in text, text[-4000:]
    return [line for line in text.splitlines() if line.startswith("trainer: error")]


def _wait_for(path: Path, pattern: str, ranks: list[ForkServerProcess], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not any(path.glob(pattern)):
        if time.monotonic() > deadline or any(process.exitcode is not None for process in ranks):
            raise AssertionError(log.read_text(errors="replace")[-4000:])
        time.sleep(0.001)


def _whole(run: Path) -> list[str]:
    folders = sorted((run / "checkpoints").iterdir())
    for folder in folders:
        if not folder.name.startswith("superseded-"):
            assert find_damage(folder, checksums=True) is None
    return [folder.name for folder in folders]


def _fill(path: Path, left: int) -> None:
    """Let a file grow until `left` bytes are free on its disk, on which others write at the same time."""
    with path.open("ab") as file:
        while (more := shutil.disk_usage(path).free - left) >= 1 << 14:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, max(more // 2, 1 << 12))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


def test_a_disk_that_runs_full_during_a_save(
    start: Callable[..., list[ForkServerProcess]], disk: Path, tmp_path: Path
) -> None:
    run, log, filler = disk / "run", tmp_path / "log", disk / "somebody else's"
    _fill(filler, 40 << 20)  # room for three checkpoints, little enough to be taken while one is written
    ranks = start(run, 8)
    _wait_for(run / "checkpoints", ".unfinished-step-00000006", ranks, log)
    _fill(filler, 0)  # after the run has measured the room
    full = time.monotonic()
    assert wait(ranks, END_SECONDS) == [1, 1], log.read_text(errors="replace")[-4000:]
    print(f"all ranks ended {time.monotonic() - full:.1f} s after the disk was full: {_complaints(log)}")
    (complaint,) = _complaints(log)
    assert f"cannot write checkpoint {run / 'checkpoints' / 'step-00000006'}: No space left on device" in complaint
    assert "step-00000004 is whole. Make room" in complaint
    assert _whole(run) == ["step-00000002", "step-00000004"]

    assert wait(start(run, 8, "--resume=latest"), LIMIT_SECONDS) == [2, 2]
    assert all("a checkpoint takes about 11.7 MB; make room" in complaint for complaint in _complaints(log))

    filler.unlink()
    damaged = run / "checkpoints" / "step-00000004" / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with damaged.open("r+b") as file:
        file.seek(2_000_000)
        byte = file.read(1)
        file.seek(2_000_000)
        file.write(bytes([byte[0] ^ 1]))
    assert wait(start(run, 8, f"--resume={damaged.parents[1]}"), LIMIT_SECONDS) == [2, 2]
    assert all(f"{damaged.name} does not have the checksum" in complaint for complaint in _complaints(log))
    assert wait(start(run, 8, "--resume=latest"), LIMIT_SECONDS) == [0, 0]
    text = log.read_text(errors="replace")
    assert f"passed over step-00000004: deepspeed/{damaged.name} does not have the checksum in manifest.json" in text
    assert "resuming from" in text and "step-00000002\n" in text
    assert _whole(run) == [f"step-0000000{step}" for step in (2, 4, 6, 8)]  # the superseded one was made again
    assert wait(start(tmp_path / "undisturbed", 8), LIMIT_SECONDS) == [0, 0]
    assert metrics(run) == metrics(tmp_path / "undisturbed")


def test_one_rank_that_cannot_write(start: Callable[..., list[ForkServerProcess]], tmp_path: Path) -> None:
    """A limit on the size of files, which needs no root, reaches torch's own writer."""
    run, log = tmp_path / "run", tmp_path / "log"
    ranks = start(run, 1000)
    _wait_for(run / "checkpoints", "step-00000002", ranks, log)
    assert ranks[1].pid is not None
    resource.prlimit(ranks[1].pid, resource.RLIMIT_FSIZE, (500_000, 500_000))
    limited = time.monotonic()
    assert wait(ranks, END_SECONDS) == [1, 1], log.read_text(errors="replace")[-4000:]
    print(f"all ranks ended {time.monotonic() - limited:.1f} s after rank 1 could not write: {_complaints(log)}")
    (complaint,) = _complaints(log)
    assert "cannot write checkpoint" in complaint and "File too large (rank 1)" in complaint
    last = _whole(run)[-1]

    ranks = start(run, 1000, "--resume=latest")
    _wait_for(run / "checkpoints", f"step-{int(last[5:]) + 2:08d}", ranks, log)
    with contextlib.suppress(FileNotFoundError):
        (run / "metrics.jsonl").rename(run / "metrics.before")
    (run / "metrics.jsonl").mkdir()
    assert wait(ranks, END_SECONDS) == [1, 1], log.read_text(errors="replace")[-4000:]
    (complaint,) = _complaints(log)
    assert "cannot write metrics.jsonl" in complaint and "Is a directory (rank 0)" in complaint
    _whole(run)
