"""A checkpoint is complete or absent."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from trainer.errors import UserError
from trainer.layout import CHECKPOINTS_FOLDER, MANIFEST_FILE
from trainer.run.checkpoint import (
    TrainerState,
    find_checkpoint,
    list_checkpoints,
    prune,
    read_state,
    save_checkpoint,
    set_aside,
)
from trainer.run.engine import Engine


class OneRank:
    """The part of an engine that saving needs, writing one small file."""

    is_main = True

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def save(self, folder: Path) -> None:
        (folder / "deepspeed").mkdir()
        (folder / "deepspeed" / "weights.pt").write_bytes(b"weights")
        if self.fails:
            raise OSError("disk full")


def _save(run: Path, step: int, keep: int | None = None, fails: bool = False) -> Path:
    state = TrainerState(step=step, epoch=2, batch=5, world_size=1, totals=[1.5, 2.0])
    return save_checkpoint(run, state, cast(Engine, OneRank(fails)), _write_config, keep)


def _write_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / CHECKPOINTS_FOLDER).iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    folder = _save(tmp_path, 7)
    assert folder.name == "step-00000007" and find_checkpoint(tmp_path, "latest") == folder
    state = read_state(folder)
    assert (state.step, state.epoch, state.batch, state.totals) == (7, 2, 5, [1.5, 2.0])
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert set(manifest["files"]) == {"deepspeed/weights.pt", "config.json", "trainer_state.json"}
    assert manifest["files"]["deepspeed/weights.pt"]["bytes"] == 7


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    with pytest.raises(OSError, match="disk full"):
        _save(tmp_path, 2, keep=1, fails=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    _save(tmp_path, 2)
    assert _names(tmp_path) == ["step-00000001", "step-00000002"]  # what the failed one left is gone


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        _save(tmp_path, step, keep=2)
    assert _names(tmp_path) == ["step-00000010", "step-00000011"]
    prune(tmp_path, 5)
    assert len(_names(tmp_path)) == 2


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (_save(tmp_path, 2) / MANIFEST_FILE).unlink()
    found = find_checkpoint(tmp_path, "latest")
    assert found is not None and found.name == "step-00000001"
    with pytest.raises(UserError, match=MANIFEST_FILE):
        find_checkpoint(tmp_path, str(tmp_path / CHECKPOINTS_FOLDER / "step-00000002"))
    assert find_checkpoint(tmp_path / "new", "latest") is None


@pytest.mark.parametrize("damage", ["short", "missing", "version"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    folder = _save(tmp_path, 1)
    if damage == "short":
        (folder / "deepspeed" / "weights.pt").write_bytes(b"wei")
    elif damage == "missing":
        (folder / "deepspeed" / "weights.pt").unlink()
    else:
        state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
        text = json.dumps({**state, "version": 9}, indent=1)
        (folder / "trainer_state.json").write_text(text)
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        manifest["files"]["trainer_state.json"]["bytes"] = len(text)
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="version 9" if damage == "version" else "weights.pt"):
        read_state(folder)


def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    (tmp_path / CHECKPOINTS_FOLDER / ".unfinished-step-00000004").mkdir()
    set_aside(tmp_path, 1)
    assert _names(tmp_path) == ["step-00000001", "superseded-step-00000002", "superseded-step-00000003"]
    found = find_checkpoint(tmp_path, "latest")
    assert found is not None and found.name == "step-00000001"
