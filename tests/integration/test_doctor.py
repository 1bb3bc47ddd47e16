"""The gradient check against the real DeepSpeed: it passes as it is, and a mis-scaled gradient does not get by."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_CHECK_ODD_CONFIGURATION = """
import pathlib, sys, torch
from trainer.run import engine, self_check
from trainer.run.ds_config import resolve_ds_config

def config(zero, **more):
    return resolve_ds_config(
        {"zero_optimization": {"stage": 2, **zero}, **more}, source="test", bf16=True, max_grad_norm=1.0,
        gradient_accumulation_steps=500, micro_batch_size=1, world_size=1,
    )

folder = sys.argv[1]
model = torch.nn.Linear(2, 2)
built = engine.build_engine(
    model, torch.optim.AdamW(model.parameters(), fused=True), ds_config=config({}), bf16=True, max_grad_norm=1.0,
    log_with=None, project_folder=pathlib.Path(folder),
)
odd = config(
    {"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=True,
    csv_monitor={"enabled": True, "output_path": folder, "job_name": "probe"},
)
print(self_check.check_gradient_scale(built, odd))
"""


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_", "LOCAL_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_doctor_finds_two_ranks_and_all_stages_in_order(tmp_path: Path) -> None:
    ended = _python("-m", "trainer", "doctor", f"--output_dir={tmp_path}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("gradient norm 1.000000 x the exact one") == 3
    assert "all-reduce     2 rank(s), right" in ended.stdout
    subjects = {line[7:22].strip() for line in ended.stdout.splitlines()}
    wanted = {"deepspeed", "GPUs", "c++", "cpu_adam", "output_dir", "/dev/shm", "SLURM", "network", "W&B", "Hub"}
    assert wanted <= subjects
    assert "WRONG" not in ended.stdout


def test_a_deepspeed_that_divides_by_the_accumulation_steps_is_refused() -> None:
    """What DeepSpeed 0.18.3 did, put into the installed one."""
    ended = _python(
        "-c",
        "from deepspeed.runtime.engine import DeepSpeedEngine as E\n"
        "right = E.backward\n"
        "E.backward = lambda self, loss, **k: right(self, loss / self.gradient_accumulation_steps(), **k)\n"
        "from trainer.run.self_check import main\n"
        "main()",
    )
    assert ended.returncode != 0
    assert "wrong by a factor of 0.25" in ended.stderr and "ZeRO stage 1, 4 micro-batches" in ended.stderr
    assert "x the exact one" not in ended.stdout


def test_the_check_takes_any_configuration_of_a_run_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """500 micro-batches in bf16, with the compiled optimizer and a monitor that the probe must not start."""
    ended = _python("-c", _CHECK_ODD_CONFIGURATION, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert float(ended.stdout.splitlines()[-1]) == 1.0
    assert list(tmp_path.iterdir()) == []
