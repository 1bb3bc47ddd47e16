"""One run, one folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Wav2Vec2Config

from trainer.arguments import PretrainArguments, dump_recipe
from trainer.errors import UserError
from trainer.model.sizes import SIZES
from trainer.run.manifest import describe_files, write_manifest
from trainer.run.run_folder import (
    Split,
    changed_settings,
    check_model_matches,
    check_run_folder,
    create_run_folder,
    lock_run_folder,
    needs_resharding,
    sees_settings,
    write_settings,
)


def _arguments(folder: Path, resume: str | None = None) -> PretrainArguments:
    return PretrainArguments(dataset_name=["speech"], output_dir=str(folder), resume=resume)


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


ZERO2: dict[str, Any] = {"stage": 2, "offload_optimizer": "none", "offload_param": "none"}


@pytest.mark.parametrize(
    ("saved", "now", "expected"),
    [
        (Split("deepspeed", 2, ZERO2), Split("deepspeed", 2, ZERO2), False),
        (Split("deepspeed", 2, None), Split("deepspeed", 2, ZERO2), False),  # from before it was noted
        (Split("deepspeed", 2, None), Split("deepspeed", 1, ZERO2), True),
        (Split("deepspeed", 2, ZERO2), Split("deepspeed", 4, ZERO2), True),
        (Split("deepspeed", 2, ZERO2), Split("deepspeed", 2, ZERO2 | {"stage": 3}), True),
        (Split("deepspeed", 2, ZERO2), Split("deepspeed", 2, ZERO2 | {"offload_optimizer": "cpu"}), True),
        (Split("deepspeed", 2, ZERO2), Split("plain", 2, None), True),
        (Split("plain", 2, None), Split("deepspeed", 2, ZERO2), True),
        (Split("plain", 2, None), Split("plain", 1, None), False),
    ],
)
def test_state_is_cut_anew_where_the_split_differs(saved: Split, now: Split, expected: bool) -> None:
    assert needs_resharding(saved, now, Path("c")) == expected


def test_a_split_that_cannot_be_reached_names_the_way() -> None:
    now = Split("deepspeed", 2, ZERO2 | {"round_robin_gradients": True})
    message = r"by 1 rank\(s\) of plain PyTorch.*2 rank.*ZeRO-2.*round_robin_gradients; set it to false"
    with pytest.raises(UserError, match=message):
        needs_resharding(Split("plain", 1, None), now, Path("c"))
    assert not needs_resharding(now, now, Path("c"))


def test_state_on_nvme_is_always_cut_anew() -> None:
    """DeepSpeed's own loading would leave out the weights."""
    nvme = Split("deepspeed", 2, ZERO2 | {"stage": 3, "offload_optimizer": "nvme"})
    for saved, now in ((nvme, nvme), (Split("plain", 1, None), nvme), (nvme, Split("plain", 1, None))):
        assert needs_resharding(saved, now, Path("c"))


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
    after = PretrainArguments(dataset_name=["speech"], output_dir=str(tmp_path), seed=3, max_train_steps=5)
    assert changed_settings(tmp_path, after) == ["max_train_steps: None -> 5", "seed: 0 -> 3"]
    started = PretrainArguments(dataset_name=["speech"], output_dir=str(tmp_path), init_from="elsewhere")
    assert changed_settings(tmp_path, started) == []  # not read by a run that goes on
    (tmp_path / "config.yaml").write_text("")  # the disk was full
    assert changed_settings(tmp_path, after) == []
    write_settings(tmp_path, after)
    assert changed_settings(tmp_path, after) == [] and sees_settings(tmp_path)
    assert json.dumps(changed_settings(tmp_path / "missing", after)) == "[]"


def test_a_folder_that_other_machines_do_not_share_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.run_folder._NEW_FILE_SECONDS", 0.0)
    assert not sees_settings(tmp_path)
