"""One run, one folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Wav2Vec2Config

from trainer.arguments import PretrainArguments, dump_recipe
from trainer.errors import UserError
from trainer.model.sizes import SIZES
from trainer.run.checkpoint import TrainerState
from trainer.run.manifest import describe_files, write_manifest
from trainer.run.run_folder import (
    changed_settings,
    check_model_matches,
    check_resumable,
    check_run_folder,
    create_run_folder,
    lock_run_folder,
    sees_settings,
    write_settings,
)


def _arguments(folder: Path, resume: str | None = None) -> PretrainArguments:
    return PretrainArguments(dataset_name="speech", output_dir=str(folder), resume=resume)


def _checkpoint(run: Path) -> Path:
    folder = run / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"version": 1}')
    write_manifest(folder, describe_files(folder))
    return folder


def test_a_new_folder_is_made_and_an_empty_one_taken(tmp_path: Path) -> None:
    assert check_run_folder(_arguments(tmp_path / "a" / "b")) == (tmp_path / "a" / "b", None, [])
    assert not (tmp_path / "a").exists()
    create_run_folder(tmp_path / "a" / "b")
    assert check_run_folder(_arguments(tmp_path / "a" / "b", resume="latest"))[1] is None


def test_another_run_is_not_written_over(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "first")
    with pytest.raises(UserError, match="--resume latest"):
        check_run_folder(_arguments(tmp_path / "first"))
    assert check_run_folder(_arguments(tmp_path / "first", resume="latest"))[1] == checkpoint
    _checkpoint(tmp_path / "second")
    with pytest.raises(UserError, match="holds another run than the checkpoint"):
        check_run_folder(_arguments(tmp_path / "second", resume=str(checkpoint)))
    assert check_run_folder(_arguments(tmp_path / "third", resume=str(checkpoint)))[1] == checkpoint


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"):
        create_run_folder(tmp_path / "file" / "run")


def test_two_runs_cannot_write_one_folder(tmp_path: Path) -> None:
    held = lock_run_folder(tmp_path)
    code = (
        "import sys, pathlib; from trainer.errors import UserError\n"
        "from trainer.run.run_folder import lock_run_folder\n"
        "try: lock_run_folder(pathlib.Path(sys.argv[1]))\n"
        "except UserError as error: sys.exit(str(error))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "being written by another run (process" in refused.stderr
    held.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_launch_that_does_not_fit_the_checkpoint_is_refused() -> None:
    state = TrainerState(step=1, world_size=2, engine="deepspeed")
    check_resumable(state, Path("c"), world_size=2, engine="deepspeed")
    with pytest.raises(UserError, match="2 ranks, this run has 4"):
        check_resumable(state, Path("c"), world_size=4, engine="deepspeed")
    with pytest.raises(UserError, match="add --deepspeed"):
        check_resumable(state, Path("c"), world_size=2, engine="plain")
    check_resumable(TrainerState(step=1, world_size=2, engine="plain"), Path("c"), world_size=4, engine="plain")


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    config = Wav2Vec2Config(**SIZES["demo"])
    (tmp_path / "config.json").write_text(config.to_json_string())
    check_model_matches(tmp_path, config)
    with pytest.raises(UserError, match=r"hidden_size \(128 there, 64 here\)"):
        check_model_matches(tmp_path, Wav2Vec2Config(**{**SIZES["demo"], "hidden_size": 64}))


def test_changed_settings_are_listed(tmp_path: Path) -> None:
    before = _arguments(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_recipe(before))
    assert changed_settings(tmp_path, before) == []
    after = PretrainArguments(dataset_name="speech", output_dir=str(tmp_path), seed=3, max_train_steps=5)
    assert changed_settings(tmp_path, after) == ["max_train_steps: None -> 5", "seed: 0 -> 3"]
    (tmp_path / "config.yaml").write_text("")  # the disk was full
    assert changed_settings(tmp_path, after) == []
    write_settings(tmp_path, after)
    assert changed_settings(tmp_path, after) == [] and sees_settings(tmp_path)
    assert json.dumps(changed_settings(tmp_path / "missing", after)) == "[]"


def test_a_folder_that_other_machines_do_not_share_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.run_folder._NEW_FILE_SECONDS", 0.0)
    assert not sees_settings(tmp_path)
