import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

START = """
import signal, socket, sys, time
from multiprocessing import connection
from trainer.data.batching import Batching, Cursor, Limits
from trainer.data.collate import MaskSettings
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.data.index import build_index
from trainer.data.loader import UtteranceDataset, training_windows

if __name__ == "__main__":
    index, _ = build_index(sys.argv[1], sys.argv[2], progress=False)
    dataset = UtteranceDataset(index, WAV2VEC2_GEOMETRY, MaskSettings(0.65, 10, 5), seed=1, random_crop=True)
    batching = Batching(index.num_samples, Limits(80_000, 4, 24_000), seed=1)
    stream = training_windows(dataset, batching, Cursor(0, 0), 0, 1, 1, num_workers=2, pin_memory=False)
    next(stream)
    print("started", flush=True)
"""

READ_FOR_EVER = """
    while True:
        next(stream)
"""

SAVE_AFTER_THREE_SIGNALS = """
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stopped.append(print(number, flush=True)))
    print("listening", flush=True)
    while len(stopped) < 3:
        next(stream)
    for _ in range(50):
        next(stream)
    print("saved", flush=True)
"""

HANG_UP_ON_A_WORKER = """
    def hang_up(address):
        client = socket.socket(socket.AF_UNIX)
        client.connect(address)
        client.close()
        raise KeyboardInterrupt

    connection.SocketClient = hang_up
    try:
        next(stream)
        next(stream)
    except KeyboardInterrupt:
        time.sleep(0.5)
        sys.exit(3)
"""

EXIT_WITHOUT_CLOSING = """
    sys.exit(3)
"""

StartTrainer = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start_trainer(tmp_path: Path, corpus: Path) -> Iterator[StartTrainer]:
    """``start_trainer(program)`` runs START and the given lines in a session of its own, up to its first window."""
    started = []

    def start(program: str) -> "subprocess.Popen[str]":
        (tmp_path / "program.py").write_text(START + program)
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(corpus), str(tmp_path / "cache")],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        wait_for(process, "started")
        return process

    yield start
    for process in started:
        if not no_process_left(process, seconds=0):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def no_process_left(process: "subprocess.Popen[str]", seconds: float) -> bool:
    """Whether the trainer's session empties in time: workers, fork server and all."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def test_workers_die_with_a_killed_trainer(start_trainer: StartTrainer) -> None:
    process = start_trainer(READ_FOR_EVER)
    process.kill()
    process.wait()
    assert no_process_left(process, seconds=4)


def test_a_trainer_that_exits_without_closing_its_windows_does_not_hang(start_trainer: StartTrainer) -> None:
    process = start_trainer(EXIT_WITHOUT_CLOSING)
    assert process.wait(timeout=20) == 3
    assert no_process_left(process, seconds=4)


def test_workers_outlive_stop_signals_to_the_whole_job(start_trainer: StartTrainer) -> None:
    process = start_trainer(SAVE_AFTER_THREE_SIGNALS)
    wait_for(process, "listening")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(process.pid, number)
        wait_for(process, str(int(number)))
    output, errors = process.communicate(timeout=20)
    assert (output, errors, process.returncode) == ("saved\n", "", 0)
    assert no_process_left(process, seconds=4)


def test_ctrl_c_prints_no_tracebacks_of_workers(start_trainer: StartTrainer) -> None:
    process = start_trainer(READ_FOR_EVER)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.count("Traceback") == 1  # the trainer's own
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert no_process_left(process, seconds=4)


def test_an_interrupt_while_taking_over_a_tensor_prints_no_traceback_of_a_worker(start_trainer: StartTrainer) -> None:
    process = start_trainer(HANG_UP_ON_A_WORKER)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (3, "")
