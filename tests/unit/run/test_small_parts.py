"""Metrics, random numbers of a micro-batch, the guard, signals, progress, trackers, the list of skipped files."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest
import torch
import wandb

from trainer.data.index import Skipped
from trainer.errors import RunWentBad, UserError
from trainer.model.pretraining import LossTerms
from trainer.run.guard import MAX_SKIPPED_IN_A_ROW, Guard
from trainer.run.metrics import Totals, append_line, drop_lines_after, means
from trainer.run.progress import Progress
from trainer.run.signals import StopRequest
from trainer.run.skipped import SkippedLog
from trainer.run.steps import dropped_layers, seed_micro_batch
from trainer.run.trackers import check_tracker, wandb_reachable


def _terms(scale: float, count: float) -> LossTerms:
    values = dict.fromkeys(LossTerms._fields, scale * count)
    return LossTerms(**{name: torch.tensor(v) for name, v in {**values, "num_targets": count}.items()})


def test_means_weigh_micro_batches_by_their_targets() -> None:
    totals = Totals(torch.device("cpu"))
    totals.add(_terms(1.0, 10), audio_seconds=2.0)
    totals.add(_terms(4.0, 30), audio_seconds=3.0)
    line = means(totals.values)
    assert line["loss"] == line["accuracy"] == pytest.approx((10 + 120) / 40)
    assert line["num_targets"] == 40 and line["audio_seconds"] == 5.0
    totals.reset()
    assert means(totals.values)["loss"] == 0.0  # nothing was added: no division by zero


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step, "split": "train", "loss": math.nan if step == 1 else 1.0})
    with path.open("a") as file:
        file.write('{"step": 2, "spl')  # killed while writing
    drop_lines_after(path, 2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["loss"] is None
    drop_lines_after(tmp_path / "missing.jsonl", 2)


def test_noise_depends_on_the_place_in_the_window_only() -> None:
    def noise(seed: int, step: int, position: int) -> float:
        seed_micro_batch(seed, step, position)
        return torch.rand(()).item()

    assert noise(0, 5, 3) == noise(0, 5, 3)
    assert len({noise(0, 5, 3), noise(1, 5, 3), noise(0, 6, 3), noise(0, 5, 4)}) == 4


def test_layer_drop_is_drawn_at_its_rate_and_alike_everywhere() -> None:
    draws = [dropped_layers(0, step, num_layers=12, probability=0.1) for step in range(2000)]
    assert draws[:50] == [dropped_layers(0, step, num_layers=12, probability=0.1) for step in range(50)]
    assert sum(map(len, draws)) / (2000 * 12) == pytest.approx(0.1, abs=0.01)
    assert dropped_layers(0, 1, num_layers=12, probability=0.0) == ()


def test_the_guard_ends_a_run_of_bad_updates() -> None:
    guard = Guard()
    for step in range(MAX_SKIPPED_IN_A_ROW - 1):
        guard.watch(step, skipped=True)
    guard.watch(100, skipped=False)  # one good update starts the count again
    for step in range(MAX_SKIPPED_IN_A_ROW - 1):
        guard.watch(step, skipped=True)
    with pytest.raises(RunWentBad, match="not finite"):
        guard.watch(200, skipped=True)


_SIGNALLED = """
import os, signal, time
from trainer.run.signals import StopRequest

def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.5)

stop = StopRequest()
stop.install()
"""


def _signalled(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _SIGNALLED + code], capture_output=True, text=True, check=False)


def test_first_signal_is_noted_second_ends_the_process() -> None:
    result = _signalled(
        "send(signal.SIGUSR1); print(stop.requested, flush=True)\n"
        "send(signal.SIGTERM); print('an echo', flush=True)\n"
        "stop.echo_seconds = 0.0\n"
        "send(signal.SIGTERM); print('still here')"
    )
    assert result.stdout == "True\nan echo\n" and result.returncode == 128 + signal.SIGTERM
    assert StopRequest().requested is False


def test_ctrl_c_asks_first_and_insists_the_second_time() -> None:
    result = _signalled(
        "send(signal.SIGINT); print(stop.requested, flush=True)\nsend(signal.SIGINT); print('still here')"
    )
    assert result.stdout == "True\n" and "saving" in result.stderr and result.returncode == 128 + signal.SIGINT


def test_a_ctrl_c_that_a_launcher_passes_on_is_not_a_second_one() -> None:
    result = _signalled("os.kill(os.getpid(), signal.SIGINT); send(signal.SIGINT); print(stop.requested)")
    assert result.stdout == "True\n" and result.returncode == 0


def test_other_signals_are_not_taken_for_a_request() -> None:
    result = _signalled("signal.signal(signal.SIGCHLD, lambda *_: None); send(signal.SIGCHLD); print(stop.requested)")
    assert result.stdout == "False\n" and result.returncode == 0


def test_without_a_terminal_each_line_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    line = {
        "step": 5, "split": "train", "loss": 4.5, "contrastive_loss": 4.4, "accuracy": 0.1, "code_perplexity": 9.0,
        "grad_norm": 1.25, "audio_seconds_per_second": 80.0,
    }  # fmt: skip
    Progress(0, 10, visible=True).show(line)
    text = capsys.readouterr().err
    for part in ("5/10", "loss 4.5", "accuracy 0.1", "grad norm 1.25", "80.0 s audio/s", "left"):
        assert part in text
    Progress(0, 10, visible=False).show(line)
    assert capsys.readouterr().err == ""


def test_a_skipped_file_that_cannot_be_listed_is_told_later(tmp_path: Path) -> None:
    log = SkippedLog(tmp_path / "missing" / "skipped.tsv", most=9)
    assert log.take_unshared() == []
    log.add([Skipped("a.wav", "empty")])  # one rank alone gets here, and must not leave the others waiting
    with pytest.raises(FileNotFoundError):
        log.take_unshared()


def test_skipped_files_are_listed_once_across_ranks(tmp_path: Path) -> None:
    first, second = (SkippedLog(tmp_path / "skipped.tsv", most=9) for _ in range(2))
    first.add([Skipped("/a\tb\n.wav", "empty")])
    second.add([Skipped("/a\tb\n.wav", "empty"), Skipped("/c.wav", "silent")])
    first.add([Skipped("/c.wav", "silent")])
    lines = (tmp_path / "skipped.tsv").read_text().splitlines()
    assert lines == ["/a\\tb\\n.wav\tempty", "/c.wav\tsilent"]


def test_a_long_list_of_skipped_files_takes_no_time(tmp_path: Path) -> None:
    """Before ranks meet again: the others wait for the one that lists what has no usable header."""
    log = SkippedLog(tmp_path / "skipped.tsv", most=20_000)
    start = time.process_time()
    log.add(Skipped(f"/data/speech/{number:08d}.wav", "empty") for number in range(10_000))
    assert time.process_time() - start < 6
    assert len((tmp_path / "skipped.tsv").read_text().splitlines()) == 10_000
    assert len(SkippedLog(tmp_path / "skipped.tsv", most=0).seen) == 10_000


def test_too_many_skipped_files_end_the_run_on_all_ranks(tmp_path: Path) -> None:
    ranks = [SkippedLog(tmp_path / "skipped.tsv", most=2) for _ in range(2)]

    def met(first: str, second: str) -> list[list[str]]:
        for rank, names in zip(ranks, (first, second), strict=True):
            rank.add([Skipped(name, "silent") for name in names])
        return [rank.take_unshared() for rank in ranks]

    for first, second in [("a", "a"), ("b", ""), ("ab", "b")]:  # the same two files, whoever meets them
        shared = met(first, second)
        for rank in ranks:
            rank.share(shared)
    ranks[0].add([Skipped("d", "silent in part")])  # other crops of that file are used
    shared = met("", "c")
    assert shared == [[], ["c"]]
    for rank in ranks:
        with pytest.raises(RunWentBad, match=r"3 files could not be used, .* allows \(2\)"):
            rank.share(shared)


def test_wandb_is_offline_without_login_or_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert wandb_reachable()
    assert not wandb_reachable()  # the server is gone
    assert capsys.readouterr().err == ""
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        return socket.socket()

    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", connect)
    assert wandb_reachable()
    assert asked == [(urllib.parse.urlsplit(wandb.Settings().base_url).hostname, 443)]  # the one it would log to


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker("none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        check_tracker("tensorboard")
    assert os.environ["WANDB_MODE"] == "offline"
