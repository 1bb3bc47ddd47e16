"""`launch/pretrain_*.sh`: what their environment variables and arguments become, and that both languages read them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.arguments import parse_arguments
from trainer.launch import pretrain_arguments

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = ["pretrain", "--config", "large", "--output_dir", "runs/large"]


def test_defaults() -> None:
    assert pretrain_arguments([], {}, "large") == DEFAULTS


@pytest.mark.parametrize("recipe", ["base", "large"])
def test_the_recipes_ask_for_zero2(recipe: str) -> None:
    assert parse_arguments([*pretrain_arguments(["speech"], {}, recipe)[1:]]).deepspeed == "zero2"


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_the_launchers_rank_is_dropped(flag: str) -> None:
    assert pretrain_arguments([flag, "--seed", "3"], {}, "large") == [*DEFAULTS, "--seed", "3"]


def test_a_bare_first_argument_is_the_data() -> None:
    arguments = pretrain_arguments(["--local_rank=0", "/data/audio", "--seed", "3"], {}, "large")
    assert arguments == [*DEFAULTS, "--dataset_name", "/data/audio", "--seed", "3"]


def test_environment_variables_become_flags() -> None:
    environ = {"DATA": "a b", "OUTPUT": "out", "DS_CONFIG": "my.json", "RECIPE": "base"}
    assert pretrain_arguments([], environ, "large") == [
        *("pretrain", "--config", "base", "--output_dir", "out", "--deepspeed", "my.json", "--dataset_name", "a b")
    ]


@pytest.mark.parametrize("given", [["--config", "my.yaml"], ["--config=my.yaml"]])
def test_a_recipe_of_the_users_own_may_name_the_run_folder(given: list[str]) -> None:
    assert "--output_dir" not in pretrain_arguments(given, {}, "large")
    assert "--output_dir" not in pretrain_arguments([], {"RECIPE": "my.yaml"}, "large")
    assert pretrain_arguments(["--config=base"], {}, "large")[3:5] == ["--output_dir", "runs/base"]


def test_an_empty_variable_counts_as_not_set() -> None:
    assert pretrain_arguments([], {"DATA": "", "OUTPUT": "", "DS_CONFIG": "", "RECIPE": ""}, "large") == DEFAULTS


def test_the_command_line_comes_after_the_environment() -> None:
    arguments = pretrain_arguments(["mine", "--output_dir", "there"], {"DATA": "theirs", "OUTPUT": "here"}, "large")
    assert arguments.index("theirs") < arguments.index("mine")
    assert arguments.index("here") < arguments.index("there")


@pytest.mark.parametrize("recipe", ["base", "large"])
@pytest.mark.parametrize("language", ["bash", sys.executable])
def test_both_languages_read_the_file(recipe: str, language: str, tmp_path: Path) -> None:
    command = [language, str(ROOT / "launch" / f"pretrain_{recipe}.sh"), "--help"]
    environ = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert "OUTPUT     run folder (--output_dir), default runs/NAME" in done.stdout
    assert "--learning_rate" in done.stdout
    assert not list(tmp_path.iterdir())


def test_help_is_printed_by_one_rank() -> None:
    command = [sys.executable, str(ROOT / "launch" / "pretrain_large.sh"), "--local_rank=1", "--help"]
    environ = {**os.environ, "RANK": "1"}
    assert subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout == ""


RESTARTED = {"SLURM_RESTART_COUNT": "2"}


def test_a_job_that_slurm_started_before_resumes() -> None:
    assert pretrain_arguments([], RESTARTED, "large") == [*DEFAULTS, "--resume", "latest"]
    assert pretrain_arguments([], {"SLURM_RESTART_COUNT": "0"}, "large") == DEFAULTS


def test_it_resumes_from_another_runs_checkpoint_only_until_it_has_one_of_its_own(tmp_path: Path) -> None:
    given = ["--resume", "/other/checkpoints/step-00000010", f"--output_dir={tmp_path}"]
    assert pretrain_arguments(given, RESTARTED, "large") == [*DEFAULTS, *given]
    (tmp_path / "checkpoints" / "step-00000020").mkdir(parents=True)
    assert pretrain_arguments(given, RESTARTED, "large")[-2:] == ["--resume", "latest"]


def test_the_job_says_how_it_is_submitted(tmp_path: Path) -> None:
    job = ["bash", str(ROOT / "launch" / "pretrain_large.sbatch")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    helped = subprocess.run([*job, "--help"], env=environ, capture_output=True, text=True, check=True)
    assert "sbatch --nodes=4" in helped.stdout and "#" not in helped.stdout.replace("#SBATCH", "")
    outside = subprocess.run(job, env=environ, capture_output=True, text=True, check=False)
    assert outside.returncode == 2 and "submit it: sbatch" in outside.stderr
    inside = {**environ, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    elsewhere = subprocess.run(job, env=inside, capture_output=True, text=True, check=False)
    assert elsewhere.returncode == 2 and "call sbatch in the repository's folder" in elsewhere.stderr
    inside |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1(x2)"}
    uneven = subprocess.run(job, env=inside, capture_output=True, text=True, check=False)
    assert uneven.returncode == 2 and "a node has 8 GPUs and 1 tasks" in uneven.stderr
