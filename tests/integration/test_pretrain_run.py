"""The real program in real processes: trained, killed, resumed, stopped, converted.

A DeepSpeed start takes some 15 seconds, so the runs below are shared between tests, and each is started in another of
the ways that are promised.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch

REPOSITORY = Path(__file__).parents[2]
CORPUS = REPOSITORY / "tests" / "corpus"
BIN = Path(sys.executable).parent
NUM_UPDATES = 60
START_LIMIT_SECONDS = 300

FLAGS = [
    "--config=demo", f"--max_train_steps={NUM_UPDATES}", "--num_warmup_steps=4", "--logging_steps=1", "--eval_steps=30",
    "--saving_steps=20", "--save_total_limit=2", "--per_device_train_batch_size=2", "--max_batch_seconds=4",
    "--gradient_accumulation_steps=2", "--deepspeed=zero2", "--num_workers=1", "--max_skipped_fraction=0.1",
    # so that a window may be split otherwise: over all ranks, the diversity of 2 x 2 micro-batches is not that of 1 x 4
    "--global_diversity=false",
]  # fmt: skip

LAUNCHERS: dict[str, list[str]] = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus=2", "--master_port={port}", "--module", "trainer"],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node=2", "--master_port={port}", "-m", "trainer"],
    "accelerate": [
        str(BIN / "accelerate"), "launch", "--config_file=launch/accelerate/eight_gpus.yaml", "--num_processes=2",
        "-m", "trainer",
    ],
    "python": [sys.executable, "-m", "trainer"],
    "bash": ["bash", "launch/pretrain_base.sh"],
}  # fmt: skip


def _environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_", "RANK"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **extra}


def _free_port() -> int:
    """A port of this moment: a fixed one may be another run's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(launcher: str, arguments: Sequence[str], log: Path, **extra: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [*(word.format(port=_free_port()) for word in LAUNCHERS[launcher]), *arguments],
            cwd=REPOSITORY,
            env=_environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _run(launcher: str, arguments: Sequence[str], log: Path, **extra: str) -> int:
    process = _start(launcher, arguments, log, **extra)
    try:
        return process.wait(timeout=START_LIMIT_SECONDS)
    finally:
        _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the ranks, which torchrun puts in sessions of their own, and to what started them."""
    ranks = _children(process.pid) if process.poll() is None else []
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        time.sleep(0.05)


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = []
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # being written
    return lines


def _wait_for_update(run: Path, step: int, process: subprocess.Popen[bytes], log: Path, said: str = "") -> None:
    """Wait until the log says `said` and then until the update is in the metrics."""
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while said not in log.read_text(errors="replace") or not any(line["step"] >= step for line in _metrics(run)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"update {step} was never reached:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.05)


def _comparable(run: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock and the memory."""
    clock = ("audio_seconds_per_second", "peak_memory_bytes")
    return [{name: value for name, value in line.items() if name not in clock} for line in _metrics(run)]


@dataclasses.dataclass
class Runs:
    """Two runs of the same settings: one left alone, one killed twice and resumed twice."""

    data: Path
    undisturbed: Path
    disturbed: Path
    log: Path
    disturbed_log: Path
    exit_code_after_signal: int


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of speech with two files that are not and one that breaks off early."""
    folder = tmp_path_factory.mktemp("data")
    for path in sorted((CORPUS / "train").rglob("*.opus"))[::4]:
        shutil.copy(path, folder / path.name)
    (folder / "not really audio.wav").write_text("words\n")
    (folder / "empty.flac").touch()
    waveform, rate = soundfile.read(next(iter(sorted((CORPUS / "validation").rglob("*.opus")))))
    # The silence makes for frames so short that the header alone does not show what is missing.
    soundfile.write(folder / "cut.flac", np.append(waveform, np.zeros(rate // 2)), rate)
    whole = (folder / "cut.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 10])  # its header still promises all of it
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    common = [
        "pretrain", *FLAGS, f"--dataset_name={data}", f"--validation_dataset_name={CORPUS / 'validation'}",
        f"--cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    log = folder / "undisturbed.log"
    code = _run("deepspeed", [*common, f"--output_dir={undisturbed}"], log)
    assert code == 0, log.read_text(errors="replace")[-4000:]

    disturbed_log = folder / "disturbed.log"
    process = _start("torchrun", [*common, f"--output_dir={disturbed}"], disturbed_log)
    try:
        _wait_for_update(disturbed, 23, process, disturbed_log)
    finally:
        _kill_group(process)  # SIGKILL, between the checkpoints of updates 20 and 40

    resumed_log = folder / "resumed.log"
    process = _start("torchrun", [*common, f"--output_dir={disturbed}", "--resume=latest"], resumed_log)
    try:
        _wait_for_update(disturbed, 23, process, resumed_log, "resuming from")
        ranks = _children(process.pid)
        os.kill(ranks[-1], signal.SIGUSR1)  # one rank only: the others hear of it when they agree on the next update
        stopped = _exit_code_of_ranks(process, resumed_log)
    finally:
        _kill_group(process)

    last_log = folder / "last.log"
    code = _run("accelerate", [*common, f"--output_dir={disturbed}", "--resume=latest"], last_log)
    assert code == 0, last_log.read_text(errors="replace")[-4000:]
    return Runs(data, undisturbed, disturbed, log, resumed_log, stopped)


def _children(pid: int) -> list[int]:
    """Process ids of the ranks under a launcher."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def _exit_code_of_ranks(launcher: subprocess.Popen[bytes], log: Path) -> int:
    """torchrun itself ends with 1 and reports the code of the rank that ended first."""
    launcher.wait(timeout=120)
    text = log.read_text(errors="replace")
    found = re.search(r"exitcode\s*:\s*(-?\d+)", text)
    assert found is not None, text[-4000:]
    return int(found[1])


def test_a_run_leaves_what_is_promised(runs: Runs) -> None:
    files = {path.name for path in runs.undisturbed.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "skipped.tsv"} <= files
    checkpoints = sorted(path.name for path in (runs.undisturbed / "checkpoints").iterdir())
    assert checkpoints == ["step-00000040", "step-00000060"]
    lines = _metrics(runs.undisturbed)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, NUM_UPDATES + 1))
    assert [line["step"] for line in lines if line["split"] == "validation"] == [30, 60]
    train = lines[0]
    assert set(train) == {
        "step", "split", "loss", "contrastive_loss", "diversity_loss", "feature_penalty", "accuracy",
        "code_perplexity", "prob_perplexity", "grad_norm", "learning_rate", "gumbel_temperature", "num_targets",
        "audio_seconds", "audio_seconds_per_second", "skipped_steps", "peak_memory_bytes",
    }  # fmt: skip
    assert train["audio_seconds"] == pytest.approx(2 * 2 * 4.0)  # ranks x accumulation x budget
    assert train["learning_rate"] == pytest.approx(0.003 / 4) and train["grad_norm"] > 0
    assert all(0 < line["contrastive_loss"] < 6 for line in lines)


def test_broken_files_are_listed_and_training_goes_on(runs: Runs) -> None:
    skipped = (runs.undisturbed / "skipped.tsv").read_text(encoding="utf-8")
    assert "not really audio.wav" in skipped and "empty.flac" in skipped
    reasons = [line.split("\t")[1] for line in skipped.splitlines() if "cut.flac" in line]
    assert len(reasons) == 1 and "truncated" in reasons[0]
    assert "files skipped" in runs.log.read_text(errors="replace")


def test_killed_and_resumed_run_equals_the_undisturbed_one(runs: Runs) -> None:
    assert "resuming from" in runs.disturbed_log.read_text(errors="replace")
    assert _comparable(runs.disturbed) == _comparable(runs.undisturbed)


def test_a_signal_to_one_rank_saves_and_asks_to_be_requeued(runs: Runs) -> None:
    assert runs.exit_code_after_signal == 4
    assert "stopped on request" in runs.disturbed_log.read_text(errors="replace")


def test_a_signal_to_the_launch_script_reaches_the_ranks(runs: Runs, tmp_path: Path) -> None:
    """`kill`, `timeout` and process managers signal the script alone; DeepSpeed's launcher would keep it to itself."""
    arguments = [
        str(runs.data), *FLAGS, f"--cache_dir={tmp_path / 'cache'}", "--max_train_steps=100000",
        "--global_diversity=true",
    ]  # fmt: skip
    process = _start("bash", arguments, tmp_path / "log", NUM_RANKS="2", OUTPUT=str(tmp_path / "run"))
    try:
        _wait_for_update(tmp_path / "run", 2, process, tmp_path / "log")
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    finally:
        _kill_group(process)
    text = (tmp_path / "log").read_text(errors="replace")
    assert code == 4, text[-4000:]
    assert "stopped on request" in text
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) >= 1


def test_resolved_recipe_can_be_passed_back(runs: Runs) -> None:
    from trainer.arguments import parse_arguments

    again = parse_arguments([f"--config={runs.undisturbed / 'config.yaml'}"])
    assert again.gradient_accumulation_steps == 2 and again.learning_rate == 0.003
    assert again.dataset_name == [str(runs.data)]


def test_converted_folder_loads_with_stock_transformers(runs: Runs, tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining, Wav2Vec2Model

    out = tmp_path / "pretrained"
    code = _run("python", ["convert", str(runs.undisturbed), str(out)], tmp_path / "convert.log")
    assert code == 0, (tmp_path / "convert.log").read_text(errors="replace")
    # with this flag from_pretrained returns a pair, which its annotation does not say
    loading: dict[str, Any] = {"output_loading_info": True}
    pretraining, info = cast(Any, Wav2Vec2ForPreTraining).from_pretrained(out, **loading)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    encoder, info = cast(Any, Wav2Vec2Model).from_pretrained(out, **loading)
    assert not info["missing_keys"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, pretraining.state_dict()[f"wav2vec2.{name}"])
    _, info = cast(Any, Wav2Vec2ForCTC).from_pretrained(out, **loading, vocab_size=30)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"lm_head"}
    extractor = AutoFeatureExtractor.from_pretrained(out)
    assert extractor.sampling_rate == 16_000 and extractor.do_normalize

    weights = torch.load(
        runs.undisturbed / "checkpoints" / "step-00000060" / "deepspeed" / "mp_rank_00_model_states.pt",
        weights_only=False,
    )["module"]
    for name, value in pretraining.state_dict().items():
        assert torch.equal(value, weights[name].float()), name


def test_what_was_converted_and_started_from_is_converted_to_the_same(runs: Runs, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    first, second = tmp_path / "first", tmp_path / "second"
    arguments = [
        "pretrain", "--config=demo", f"--init_from={first}", f"--model_name_or_path={first}", "--learning_rate=1e-30",
        "--max_train_steps=1", "--num_warmup_steps=0", "--max_batch_seconds=4", "--num_workers=0",
        "--max_skipped_fraction=0.1", f"--dataset_name={runs.data}", "--validation_split_percentage=0",
        f"--cache_dir={tmp_path / 'cache'}",
        f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    for command in (
        ["convert", str(runs.undisturbed), str(first)],
        arguments,  # one update at a learning rate far below the rounding of every weight
        ["convert", str(tmp_path / "run"), str(second)],
    ):
        assert _run("python", command, tmp_path / "log") == 0, (tmp_path / "log").read_text(errors="replace")[-4000:]
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_one_process_in_bf16_with_wandb_offline(runs: Runs, tmp_path: Path) -> None:
    """`python -m trainer`: one rank without a launcher, DeepSpeed in bf16, W&B's real package without a network."""
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = [
        "pretrain", *FLAGS, f"--dataset_name={runs.data}", f"--output_dir={out}", "--bf16", "--max_train_steps=4",
        "--report_to=wandb", f"--cache_dir={tmp_path / 'cache'}", "--num_workers=0",
    ]  # fmt: skip
    code = _run("python", arguments, log, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40)
    text = log.read_text(errors="replace")
    assert code == 0, text[-4000:]
    assert "logging offline" in text and "bf16" in text
    recorded = list((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(recorded) == 1 and b"train/contrastive_loss" in recorded[0].read_bytes()
    assert [line["split"] for line in _metrics(out)][-1] == "validation"  # a share of the training data


def test_one_rank_that_accumulates_equals_two(runs: Runs, tmp_path: Path) -> None:
    """The same window in 1 x 4 micro-batches instead of 2 x 2: same gradients, noise and masks included."""
    arguments = [
        "pretrain", *FLAGS, f"--dataset_name={runs.data}", f"--output_dir={tmp_path / 'run'}", "--num_workers=0",
        f"--validation_dataset_name={CORPUS / 'validation'}", f"--cache_dir={tmp_path / 'cache'}",
        "--gradient_accumulation_steps=4",
    ]  # fmt: skip
    code = _run("python", arguments, tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text(errors="replace")[-4000:]
    pairs = list(zip(_metrics(tmp_path / "run"), _metrics(runs.undisturbed), strict=True))
    for ours, theirs in pairs[:10]:
        assert ours["num_targets"] == theirs["num_targets"]
        for name in ("loss", "contrastive_loss", "code_perplexity"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name in ("learning_rate", "gumbel_temperature"):  # functions of the update alone
            assert ours[name] == theirs[name], name


def test_a_run_that_collapses_ends_itself(tmp_path: Path) -> None:
    arguments = [
        "pretrain", "--config=demo", "--learning_rate=0.3", "--lr_scheduler_type=constant", "--num_warmup_steps=0",
        "--max_train_steps=100", "--logging_steps=2", "--collapse_patience=8", "--saving_steps=2",
        "--save_total_limit=1", "--max_batch_seconds=4", f"--dataset_name={CORPUS / 'validation'}",
        "--validation_split_percentage=0", f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert _run("python", arguments, tmp_path / "log") == 3
    assert "the codebooks have collapsed" in (tmp_path / "log").read_text()
    lines = _metrics(tmp_path / "run")
    sound = max((line["step"] for line in lines if line["code_perplexity"] >= 3), default=0)
    assert lines[-1]["step"] == sound + 8
    # the newest, and the last from before the collapse
    kept = [int(folder.name.removeprefix("step-")) for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert kept == ([sound] if sound else []) + [sound + 6]


def test_plain_pytorch_resumes_too(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [
        "pretrain", *FLAGS, f"--dataset_name={runs.data}", f"--output_dir={out}", f"--cache_dir={tmp_path / 'cache'}",
        "--num_workers=0", f"--validation_dataset_name={CORPUS / 'validation'}",
    ]  # fmt: skip
    arguments.remove("--deepspeed=zero2")
    assert _run("torchrun", arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text(errors="replace")[-4000:]
    whole = _comparable(out)
    shutil.rmtree(out / "checkpoints" / "step-00000060")
    # accelerate's own environment must not change the gradient
    accumulate = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    assert _run("torchrun", [*arguments, "--resume=latest"], tmp_path / "log", **accumulate) == 0
    assert _comparable(out) == whole
    settings = (out / "config.yaml").read_text()
    less = [*arguments, "--resume=latest", "--max_train_steps=30"]
    assert _run("python", less, tmp_path / "log") == 0
    assert "nothing left to do" in (tmp_path / "log").read_text() and (out / "config.yaml").read_text() == settings
    # the same data without DeepSpeed gives the same losses; later on rounding grows apart
    assert [line["num_targets"] for line in whole] == [line["num_targets"] for line in _metrics(runs.undisturbed)]
    for ours, theirs in zip(whole[:10], _metrics(runs.undisturbed)[:10], strict=True):
        assert ours["contrastive_loss"] == pytest.approx(theirs["contrastive_loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
