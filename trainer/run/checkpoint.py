"""Checkpoints that are complete or absent: written aside, listed in a manifest, renamed, and only then pruned."""

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.layout import (
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    STEP_PREFIX,
    SUPERSEDED_PREFIX,
    TRAINER_STATE_FILE,
    UNFINISHED_PREFIX,
    step_folder_name,
)
from trainer.run.engine import Engine

STATE_VERSION = 1


@dataclasses.dataclass
class TrainerState:
    """What a run has to remember besides weights and optimizer; everything else follows from it and the settings."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    world_size: int = 1
    engine: str = "deepspeed"
    freeze_feature_encoder: bool = False
    skipped_steps: int = 0
    interval_seconds: float = 0.0
    validation_due: bool = False
    totals: list[float] = dataclasses.field(default_factory=list)
    partitioning: dict[str, Any] | None = None  # None in a checkpoint from before it was noted
    num_micro_batches: int = 0  # of all ranks since the start; 0 in such a checkpoint too
    version: int = STATE_VERSION


def save_checkpoint(
    run_folder: Path,
    state: TrainerState,
    engine: Engine,
    write_model_files: Callable[[Path], None],
    save_total_limit: int | None,
) -> Path:
    """Write `checkpoints/step-N` and remove the oldest beyond `save_total_limit`; every rank calls it.

    `write_model_files` puts the model's configuration beside the weights (called on the main rank).
    """
    parent = run_folder / CHECKPOINTS_FOLDER
    final = parent / step_folder_name(state.step)
    unfinished = parent / (UNFINISHED_PREFIX + final.name)
    if engine.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    engine.barrier()
    engine.save(unfinished)
    engine.barrier()
    if engine.is_main:
        write_model_files(unfinished)
        _write_json(unfinished / TRAINER_STATE_FILE, dataclasses.asdict(state))
        _write_json(unfinished / MANIFEST_FILE, {"version": STATE_VERSION, "files": describe_files(unfinished)})
        _publish(unfinished, final)
        if save_total_limit is not None:
            prune(run_folder, save_total_limit)
    engine.barrier()
    return final


def describe_files(folder: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every file below `folder`, by relative path; each file is flushed to disk on the way."""
    described = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        checksum = 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
            os.fsync(file.fileno())
        described[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": checksum}
    return described


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _publish(unfinished: Path, final: Path) -> None:
    """Give a complete folder its name; a crash leaves either the old state or the new one."""
    shutil.rmtree(final, ignore_errors=True)  # left by a run that was resumed from before this step
    os.rename(unfinished, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(run_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; each loses its manifest first, so it is never half there."""
    for folder in list_checkpoints(run_folder)[:-keep]:
        (folder / MANIFEST_FILE).unlink()
        shutil.rmtree(folder)


def set_aside(run_folder: Path, resumed_step: int) -> None:
    """Clear the way for a resumed run: unfinished saves go, checkpoints of later updates are renamed `superseded-...`.

    Left in place, a later one would be taken for the newest when the run is resumed again.
    """
    for folder in (run_folder / CHECKPOINTS_FOLDER).glob(f"{UNFINISHED_PREFIX}*"):
        shutil.rmtree(folder)
    for folder in list_checkpoints(run_folder):
        if folder.name > step_folder_name(resumed_step):
            superseded = folder.with_name(SUPERSEDED_PREFIX + folder.name)
            shutil.rmtree(superseded, ignore_errors=True)
            folder.rename(superseded)


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run_folder / CHECKPOINTS_FOLDER).glob(f"{STEP_PREFIX}*")
    return sorted(folder for folder in folders if (folder / MANIFEST_FILE).is_file())


def find_checkpoint(run_folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` names; None for `latest` in a run that has none yet. Raises `UserError`."""
    if resume == "latest":
        complete = list_checkpoints(run_folder)
        return complete[-1] if complete else None
    folder = Path(resume)
    if not (folder / MANIFEST_FILE).is_file():
        raise UserError(
            f"resume ({resume}) must be 'latest' or a complete checkpoint folder such as "
            f"{run_folder / CHECKPOINTS_FOLDER / step_folder_name(1000)}; it holds no {MANIFEST_FILE}."
        )
    return folder


def read_state(folder: Path) -> TrainerState:
    """Trainer state of a checkpoint whose files are all there in full. Raises `UserError` naming what is not."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    for name, described in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != described["bytes"]:
            raise UserError(
                f"checkpoint {folder} is damaged: {name} is missing or not {described['bytes']} bytes long; "
                "pass an older one with --resume PATH."
            )
    content = json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    if content.get("version") != STATE_VERSION:
        raise UserError(
            f"checkpoint {folder} has trainer state version {content.get('version')}, this program reads "
            f"{STATE_VERSION}; resume it with the version that wrote it."
        )
    return TrainerState(**content)
