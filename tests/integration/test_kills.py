"""Runs that are killed again and again, while they start, train and save, and end like runs left alone.

Each ZeRO stage has one run that nobody disturbs and one with the same settings that gets `NUM_KILLS` SIGKILLs. A third
of them falls into a save, a quarter into a start. KILLS_SEED=NUMBER gives other moments; each kill is printed
(pytest -s).
"""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration.ranks import kill, metrics, start_ranks, wait, warm_up
from trainer.run.manifest import find_damage

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parents[1] / "corpus"
SEED = int(os.environ.get("KILLS_SEED", "0"))
NUM_KILLS = 8  # for each of the stages
NUM_UPDATES = 20
START_LIMIT_SECONDS = 120.0
# What a rank takes at most to notice that another one has died.
NOTICE_SECONDS = 30.0

_OFFLOAD = {"device": "cpu"}
STAGES: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero2 with offload": {"stage": 2, "offload_optimizer": _OFFLOAD},
}


class Kill(NamedTuple):
    """A moment in the life of a started run, and who dies.

    `updates` more are made, then `share` of what a start, an update or a tenth of one (while saving) takes.
    """

    phase: str
    updates: int
    share: float
    victims: str


class Pace(NamedTuple):
    """What a start and an update of the undisturbed run took."""

    start_seconds: float
    update_seconds: float


def _kills(generator: random.Random) -> list[Kill]:
    """A shuffled list in which each phase has its share."""
    phases = ["starting"] * (NUM_KILLS // 4) + ["saving"] * (-(-NUM_KILLS // 3))
    phases += ["training"] * (NUM_KILLS - len(phases))
    generator.shuffle(phases)
    return [
        Kill(
            phase,
            generator.randint(0, 2) if phase == "training" else 0,
            generator.random(),
            # alone in a start, a rank waits for the others to come
            "all" if phase == "starting" else generator.choice(["all", "rank 0", "rank 1"]),
        )
        for phase in phases
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for path in sorted((CORPUS / "train").rglob("*.opus"))[::8]:
        shutil.copy(path, folder / path.name)
    return folder


def _arguments(data: Path, folder: Path, zero: dict[str, Any], run: str) -> list[str]:
    config = folder / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {**zero, "overlap_comm": False}}))
    return [
        "pretrain", "--config=demo", f"--max_train_steps={NUM_UPDATES}", "--num_warmup_steps=4", "--logging_steps=1",
        "--eval_steps=7", "--saving_steps=2", "--save_total_limit=2", "--per_device_train_batch_size=2",
        "--max_batch_seconds=4", "--gradient_accumulation_steps=2", f"--deepspeed={config}", f"--dataset_name={data}",
        "--validation_split_percentage=5", f"--cache_dir={folder / 'cache'}", f"--output_dir={folder / run}",
    ]  # fmt: skip


def _wait_until(what: Callable[[], bool], ranks: list[ForkServerProcess], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while not what():
        if time.monotonic() > deadline or any(process.exitcode is not None for process in ranks):
            raise AssertionError(log.read_text(errors="replace")[-4000:])
        time.sleep(0.001)


def _said(log: Path, text: str) -> Callable[[], bool]:
    return lambda: text in log.read_text(errors="replace")


def _strike(planned: Kill, pace: Pace, ranks: list[ForkServerProcess], run: Path, log: Path) -> float:
    """Kill as planned; returns the seconds until the last rank was gone: the others must end by themselves."""
    if planned.phase != "starting":
        _wait_until(_said(log, "\ntraining "), ranks, log)
    done = len(metrics(run))
    if planned.phase == "saving":
        _wait_until(lambda: any((run / "checkpoints").glob(".unfinished-*")), ranks, log)
        done = len(metrics(run))
    elif planned.phase == "training":
        _wait_until(lambda: len(metrics(run)) >= done + planned.updates, ranks, log)
        done += planned.updates
    scale = {"starting": pace.start_seconds, "training": pace.update_seconds, "saving": pace.update_seconds / 10}
    moment = time.monotonic() + planned.share * scale[planned.phase]
    while time.monotonic() < moment and len(metrics(run)) <= done:  # not far beyond, where the pace has changed
        time.sleep(0.001)
    assert all(process.exitcode is None for process in ranks), "over before it could be killed"
    struck = time.monotonic()
    kill(ranks if planned.victims == "all" else [ranks[int(planned.victims[-1])]])
    assert None not in wait(ranks, NOTICE_SECONDS), "the other rank waits for the one that was killed"
    return time.monotonic() - struck


def _check_folders(run: Path) -> list[Path]:
    folders = sorted((run / "checkpoints").glob("step-*"))
    assert {folder.name: find_damage(folder, checksums=True) for folder in folders} == {f.name: None for f in folders}
    return folders


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_again_and_again_equals_one_left_alone(stage: str, data: Path, tmp_path: Path) -> None:
    seed = f"{stage}, seed {SEED}"
    log = tmp_path / "log"
    warm_up(log)
    start = time.monotonic()
    ranks = start_ranks(_arguments(data, tmp_path, STAGES[stage], "undisturbed"), log)
    try:
        _wait_until(_said(log, "\ntraining "), ranks, log)
        started = time.monotonic()
        assert wait(ranks, START_LIMIT_SECONDS) == [0, 0], log.read_text(errors="replace")[-4000:]
    finally:
        kill(ranks)
    pace = Pace(started - start, (time.monotonic() - started) / NUM_UPDATES)

    run = tmp_path / "killed"
    arguments = [*_arguments(data, tmp_path, STAGES[stage], "killed"), "--resume=latest"]
    newest: str | None = None
    in_saves, last_gone = 0, 0.0
    for number, planned in enumerate([*_kills(random.Random(seed)), None]):
        log = tmp_path / f"log-{number}"
        start = time.monotonic()
        ranks = start_ranks(arguments, log)
        try:
            if planned is None:
                assert wait(ranks, START_LIMIT_SECONDS) == [0, 0], log.read_text(errors="replace")[-4000:]
            else:
                last_gone = max(last_gone, _strike(planned, pace, ranks, run, log))
        finally:
            kill(ranks)
        text = log.read_text(errors="replace")
        if planned is None or planned.phase != "starting":
            resumed = re.search(r"resuming from \S+/(step-\d+)", text)
            assert (resumed[1] if resumed else None) == newest, text[-4000:]
        folders = _check_folders(run)
        newest = folders[-1].name if folders else None
        unfinished = [path.name for path in (run / "checkpoints").glob(".unfinished-*")]
        in_saves += bool(unfinished)
        print(f"{seed}: {planned}, {time.monotonic() - start:.1f} s; newest {newest}, {unfinished}")
    print(f"{seed}: {pace}, {NUM_KILLS} kills, {in_saves} left an unfinished save, ranks gone after {last_gone:.1f} s")
    assert metrics(run) == metrics(tmp_path / "undisturbed")
