"""Which checkpoint of a run is taken, and what makes one unfit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.convert.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from trainer.convert.errors import ConversionError


@pytest.fixture
def run(tmp_path: Path, seal: Callable[..., None]) -> Path:
    """Steps 900 and 1,000 are complete; 2,000 has no manifest and 3,000 a temporary name."""
    for name in ("step-00000900", "step-00001000", "step-00002000", ".unfinished-step-00003000", "tmp-step-00004000"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"a": 1}')
        seal(folder, step=1000)
    (tmp_path / "checkpoints" / "step-00002000" / "manifest.json").unlink()
    return tmp_path


def test_newest_complete_checkpoint_is_taken(run: Path) -> None:
    newest = run / "checkpoints" / "step-00001000"
    assert find_checkpoint(run) == newest
    assert find_checkpoint(run / "checkpoints") == newest
    assert find_checkpoint(newest.with_name("step-00000900")) == newest.with_name("step-00000900")
    assert open_checkpoint(newest, checksums=True) == Checkpoint(
        newest, 1000, 2, "deepspeed", newest / "deepspeed", newest
    )


def test_unfinished_saves_are_refused(run: Path) -> None:
    for name in ("step-00002000", ".unfinished-step-00003000", "tmp-step-00004000"):
        with pytest.raises(ConversionError, match="unfinished save"):
            open_checkpoint(find_checkpoint(run / "checkpoints" / name), checksums=False)


def test_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(ConversionError, match="is not a folder"):
        find_checkpoint(tmp_path / "none")


def test_missing_short_and_altered_files_are_named(run: Path) -> None:
    folder = run / "checkpoints" / "step-00001000"
    config = folder / "config.json"
    config.write_text('{"a": 2}')
    open_checkpoint(folder, checksums=False)
    with pytest.raises(ConversionError, match=r"config\.json: CRC-32"):
        open_checkpoint(folder, checksums=True)
    config.write_text("{}")
    with pytest.raises(ConversionError, match=r"config\.json: has 2 bytes where manifest\.json says 8"):
        open_checkpoint(folder, checksums=False)
    config.unlink()
    with pytest.raises(ConversionError, match=r"config\.json: listed in manifest\.json but missing"):
        open_checkpoint(folder, checksums=False)


def test_manifest_without_checksums_is_enough(run: Path) -> None:
    folder = run / "checkpoints" / "step-00001000"
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": {"config.json": {"bytes": 8}}}))
    assert open_checkpoint(folder, checksums=True).step == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"version \(2\) must be 1"),
        ({"step": "x"}, r"step \('x'\)"),
        ({"world_size": None}, "world_size"),
    ],
)
def test_unknown_trainer_state_is_refused(
    run: Path, seal: Callable[..., None], changes: dict[str, object], message: str
) -> None:
    folder = run / "checkpoints" / "step-00001000"
    seal(folder, **changes)
    with pytest.raises(ConversionError, match=rf"trainer_state\.json: {message}"):
        open_checkpoint(folder, checksums=True)


def test_broken_json_is_named(run: Path) -> None:
    folder = run / "checkpoints" / "step-00001000"
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ConversionError, match=r"manifest\.json: not readable as JSON"):
        open_checkpoint(folder, checksums=True)
