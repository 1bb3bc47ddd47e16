"""The shipped job in a real SLURM: stopped, queued again, resumed; cancelled; and not queued again when it is wrong."""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.ranks import kill, metrics, start_ranks, wait
from tests.slurm.cluster import Cluster, slurm_cluster, why_not

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
CORPUS = REPOSITORY / "tests" / "corpus"
BIN = Path(sys.executable).parent
LIMIT_SECONDS = 240.0
NUM_UPDATES = 40
FLAGS = [
    f"--max_train_steps={NUM_UPDATES}", "--num_warmup_steps=4", "--logging_steps=1", "--eval_steps=20",
    "--saving_steps=1000", "--per_device_train_batch_size=2", "--max_batch_seconds=4", "--deepspeed=zero2",
    "--num_workers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for path in sorted((CORPUS / "train").rglob("*.opus"))[::8]:
        shutil.copy(path, folder / path.name)
    return folder


class _Job:
    """The shipped job on two nodes with one CPU rank each, its run folder and logs below `folder`."""

    def __init__(self, cluster: Cluster, folder: Path, *arguments: str) -> None:
        self.cluster = cluster
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_", "RANK"))},
            "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "RECIPE": "demo",
            "OUTPUT": str(folder / "run"), "LOGS": str(folder / "logs"),
        }  # fmt: skip
        self.number = self._slurm(
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
            f"--output={folder / 'job.log'}", "launch/pretrain_large.sbatch", *arguments,
        ).strip()  # fmt: skip

    def _slurm(self, *command: str) -> str:
        return self.cluster.run(*command, cwd=REPOSITORY, environment=self.environment)

    def signal(self, *options: str) -> None:
        self._slurm("scancel", *options, self.number)

    def facts(self) -> dict[str, str]:
        """What SLURM knows of it: JobState, ExitCode, Restarts and more."""
        return dict(re.findall(r"(\S+?)=(\S*)", self._slurm("scontrol", "show", "job", self.number)))

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not what():
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.2)

    def wait_for_end(self) -> dict[str, str]:
        self.wait_for(lambda: self.facts()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
        return self.facts()

    def told(self) -> str:
        """Its logs, the ranks' last."""
        logs = [self.folder / "job.log", *sorted((self.folder / "logs" / self.number).glob("rank-*.log"))]
        return "\n".join(log.read_text(errors="replace")[-4000:] for log in logs if log.exists())


def test_a_stopped_job_saves_queues_itself_again_and_ends_like_one_left_alone(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, f"--cache_dir={tmp_path / 'cache'}"]
    job = _Job(cluster, tmp_path, str(data), *flags)
    run = tmp_path / "run"
    job.wait_for(lambda: len(metrics(run)) >= 5)
    job.signal("--signal=USR1")
    job.wait_for(lambda: job.facts()["Restarts"] == "1")
    saved = [path.name for path in (run / "checkpoints").glob("step-*")]
    assert len(saved) == 1 and saved != [f"step-{NUM_UPDATES:08d}"], job.told()

    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), job.told()
    log = (tmp_path / "job.log").read_text()
    told = ("start 1 on n[1-2]", "ended with code 4", "queued again", "start 2 on n[1-2]", "ended with code 0")
    assert [part for part in told if part in log] == list(told), log
    assert log.count(f"meeting at n1:{10000 + int(job.number)}") == 2
    logs = [(tmp_path / "logs" / job.number / f"rank-{rank}.log").read_text(errors="replace") for rank in (0, 1)]
    assert "stopped on request" in logs[0] and f"resuming from {run / 'checkpoints' / saved[0]}" in logs[0]
    assert all("stopping after this update" in text for text in logs)

    arguments = ["pretrain", "--config=demo", *flags, f"--dataset_name={data}", f"--output_dir={tmp_path / 'alone'}"]
    ranks = start_ranks(arguments, tmp_path / "log")
    try:
        assert wait(ranks, LIMIT_SECONDS) == [0, 0]
    finally:
        kill(ranks)
    assert metrics(run) == metrics(tmp_path / "alone")


def test_a_cancelled_job_saves_and_stays_away(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    job = _Job(cluster, tmp_path, str(data), *FLAGS, f"--cache_dir={tmp_path / 'cache'}", "--max_train_steps=100000")
    job.wait_for(lambda: len(metrics(tmp_path / "run")) >= 2)
    job.signal()
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), job.told()
    job.wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob("step-*")))


def test_a_wrong_flag_is_told_by_the_ranks_and_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    job = _Job(cluster, tmp_path, "no such folder", "--learning_rate=-1")
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), job.told()
    assert "learning_rate (-1.0) must be greater than 0" in job.told()
