"""`accelerate launch` with each of the shipped YAML files; `eight_gpus.yaml` is used in `test_pretrain_run.py`."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.integration.ranks import metrics

REPOSITORY = Path(__file__).parents[2]
CORPUS = REPOSITORY / "tests" / "corpus"
YAML_FOLDER = REPOSITORY / "launch" / "accelerate"
LIMIT_SECONDS = 240


def _start(folder: Path, launcher: list[str], *flags: str) -> subprocess.Popen[str]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for path in sorted((CORPUS / "train").rglob("*.opus"))[::32]:
        shutil.copy(path, data)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "trainer", "pretrain", "--config=demo",
        "--max_train_steps=2", "--num_warmup_steps=1", "--logging_steps=1", "--per_device_train_batch_size=2",
        "--max_batch_seconds=4", "--deepspeed=zero2", "--validation_split_percentage=0", f"--dataset_name={data}",
        f"--cache_dir={folder / 'cache'}", f"--output_dir={folder / 'run'}", *flags,
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "RANK"))}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env={**kept, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _output(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=LIMIT_SECONDS)[0]
    finally:
        process.kill()


@pytest.mark.parametrize("path", sorted(YAML_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_asks_for_deepspeed_and_leaves_its_settings_to_the_flags(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type == "DEEPSPEED" and config.mixed_precision is None
    assert set(config.deepspeed_config) <= {"deepspeed_multinode_launcher"}


@pytest.mark.slow
def test_one_process(tmp_path: Path) -> None:
    process = _start(tmp_path, [f"--config_file={YAML_FOLDER / 'one_gpu.yaml'}"])
    text = _output(process)
    assert process.returncode == 0 and "on 1 rank(s)" in text, text[-4000:]
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.slow
def test_two_machines(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [
        f"--config_file={YAML_FOLDER / 'multi_node.yaml'}", "--num_processes=2", "--main_process_ip=127.0.0.1",
        f"--main_process_port={port}",
    ]  # fmt: skip
    machines = [_start(tmp_path, [*launcher, f"--machine_rank={rank}"]) for rank in range(2)]
    texts = [_output(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(text[-4000:] for text in texts)
    assert "on 2 rank(s)" in texts[0] and len(metrics(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_second_owner_of_a_setting_is_named(tmp_path: Path) -> None:
    """As `accelerate config` writes it: a precision of `no` is none, a ZeRO stage is one too many."""
    mine = tmp_path / "mine.yaml"
    text = (YAML_FOLDER / "one_gpu.yaml").read_text()
    mine.write_text(f"{text}mixed_precision: 'no'\ndeepspeed_config:\n  zero_stage: 3\n  zero3_init_flag: false\n")
    process = _start(tmp_path, [f"--config_file={mine}"])
    told = _output(process)
    assert process.returncode != 0 and "exitcode  : 2" in told
    lines = [line.split(" in accelerate's")[0] for line in told.splitlines() if line.startswith("trainer: error")]
    assert lines == ["trainer: error: zero_stage (3)", "trainer: error: zero3_init_flag (false)"]
