"""Checkpoints that are complete or absent: written aside, listed in a manifest, renamed, and only then pruned."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.convert.errors import ConversionError
from trainer.convert.safe_load import safe_load
from trainer.errors import CannotWrite, UserError
from trainer.layout import (
    CHECKPOINTS_FOLDER,
    DEEPSPEED_FOLDER,
    MANIFEST_FILE,
    METRICS_FILE,
    REMOVED_PREFIX,
    STEP_PREFIX,
    SUPERSEDED_PREFIX,
    TRAINER_STATE_FILE,
    UNFINISHED_PREFIX,
    step_folder_name,
)
from trainer.run.engine import Engine
from trainer.run.manifest import (
    checkpoint_bytes,
    describe_files,
    find_damage,
    flush,
    write_json,
    write_manifest,
)
from trainer.run.storage import free_bytes, gigabytes, on_all_ranks, on_main_rank

STATE_VERSION = 1
_STEP = re.compile(re.escape(STEP_PREFIX) + r"\d{8,}")


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
    sound_step: int | None = None  # last log that showed more than collapsed codebooks; None: of an older program
    totals: list[float] = dataclasses.field(default_factory=list)
    partitioning: dict[str, Any] | None = None  # None in a checkpoint from before it was noted
    corpus: int | None = None  # `corpus.fingerprint` of the audio; None in such a checkpoint too
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

    Raises:
        CannotWrite: on all ranks. What was written is removed, earlier checkpoints are as they were. The run ends,
            because every hour it went on for would be lost with the next crash, and a job that ended is noticed.
    """
    parent = run_folder / CHECKPOINTS_FOLDER
    final = parent / step_folder_name(state.step)
    unfinished = parent / (UNFINISHED_PREFIX + final.name)
    what = f"checkpoint {final}"
    remedy = _way_on(run_folder)
    try:
        on_main_rank(engine, what, lambda: _begin(unfinished, space_needed(run_folder, engine)), remedy)
        on_all_ranks(engine, what, lambda: engine.save(unfinished), remedy)

        def write_the_rest() -> None:
            if (metrics := run_folder / METRICS_FILE).exists():
                flush(metrics)  # a run that goes on from here does not write these lines again
            write_model_files(unfinished)
            write_json(unfinished / TRAINER_STATE_FILE, dataclasses.asdict(state))

        on_main_rank(engine, what, write_the_rest, remedy)
        shares = on_all_ranks(engine, what, lambda: describe_files(unfinished, engine.rank, engine.world_size), remedy)

        def publish() -> None:
            write_manifest(unfinished, {name: facts for share in shares for name, facts in share.items()})
            _remove(final)  # left by a run that was resumed from before this step
            os.rename(unfinished, final)
            flush(parent)

        on_main_rank(engine, what, publish, remedy)
    except CannotWrite:
        if engine.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if save_total_limit is not None:
        keep = save_total_limit
        on_main_rank(engine, what, lambda: prune(run_folder, keep, state.sound_step), remedy)
    engine.barrier()
    return final


def space_needed(run_folder: Path, engine: Engine) -> int:
    """Bytes that the next checkpoint takes: as many as the last one, before there is one an estimate from below."""
    complete = list_checkpoints(run_folder)
    last = checkpoint_bytes(complete[-1]) if complete else None
    return last or engine.checkpoint_bytes


def _begin(unfinished: Path, needed: int) -> None:
    """Make an empty folder to write into, if there is room for `needed` bytes. Raises `OSError`."""
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    free = free_bytes(unfinished)
    if free is not None and free < needed:
        raise OSError(f"it takes {gigabytes(needed)} and {gigabytes(free)} are free")


def _way_on(run_folder: Path) -> str:
    """What to do once a checkpoint could not be written."""
    complete = list_checkpoints(run_folder)
    if not complete:
        return "there is no earlier one. Make room, or choose another --output_dir."
    return (
        f"{complete[-1].name} is whole. Make room (a lower --save_total_limit keeps fewer), then go on with "
        "--resume latest."
    )


def _remove(folder: Path) -> None:
    """Remove a checkpoint, which first loses its name, so that it is never half there."""
    if folder.exists():
        removed = folder.with_name(REMOVED_PREFIX + folder.name)
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)  # somebody may be reading it; the next start tries again


def prune(run_folder: Path, keep: int, sound_step: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and superseded ones of updates that have been made again.

    The newest one up to `sound_step` stays, for a run that has collapsed since then can only go on from there.
    """
    complete = list_checkpoints(run_folder)
    sound = [folder for folder in complete if sound_step is not None and folder.name <= step_folder_name(sound_step)]
    for folder in complete[:-keep]:
        if folder not in sound[-1:]:
            _remove(folder)
    for folder in (run_folder / CHECKPOINTS_FOLDER).glob(f"{SUPERSEDED_PREFIX}{STEP_PREFIX}*"):
        step = folder.name.removeprefix(SUPERSEDED_PREFIX)
        if complete and _STEP.fullmatch(step) and step <= complete[-1].name:
            _remove(folder)


def set_aside(run_folder: Path, resumed_step: int) -> None:
    """Clear the way for a resumed run: unfinished saves go, folders of later updates are renamed `superseded-...`.

    Left in place, a later one would be taken for the newest when the run is resumed again.
    """
    parent = run_folder / CHECKPOINTS_FOLDER
    for prefix in (UNFINISHED_PREFIX, REMOVED_PREFIX):
        for folder in parent.glob(f"{prefix}*"):
            shutil.rmtree(folder)
    for folder in _step_folders(run_folder):
        if folder.name > step_folder_name(resumed_step):
            superseded = folder.with_name(SUPERSEDED_PREFIX + folder.name)
            shutil.rmtree(superseded, ignore_errors=True)
            folder.rename(superseded)


def _step_folders(run_folder: Path) -> list[Path]:
    """The run's own; a copy that somebody keeps beside them under a longer name is none."""
    return sorted(
        folder for folder in (run_folder / CHECKPOINTS_FOLDER).glob(f"{STEP_PREFIX}*") if _STEP.fullmatch(folder.name)
    )


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [folder for folder in _step_folders(run_folder) if (folder / MANIFEST_FILE).is_file()]


def find_checkpoint(
    run_folder: Path, resume: str, known_damage: Mapping[Path, str] | None = None
) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume` names, and which newer ones `latest` passed over and why.

    Checked are the names and sizes of its files; `known_damage` says what else was found. None for `latest` in a run
    that has no checkpoint yet. Raises `UserError` where there are some but none that can be used: they are worth a look
    before the run starts again from nothing.
    """
    known_damage = known_damage or {}
    if resume != "latest":
        return _named_checkpoint(run_folder, Path(resume), known_damage), []
    passed_over: list[str] = []
    for folder in reversed(_step_folders(run_folder)):
        problem = known_damage.get(folder) or _damage(folder)
        if problem is None:
            return folder, [*_unfinished_after(folder), *passed_over]
        passed_over.append(f"{folder.name}: {problem}")
    if passed_over:
        raise UserError(
            f"resume (latest) finds no usable checkpoint in {run_folder / CHECKPOINTS_FOLDER} "
            f"({'; '.join(passed_over)}); restore one, or start anew in another --output_dir."
        )
    return None, []


def _unfinished_after(found: Path) -> list[str]:
    """Saves of later updates than that of `found` that the end of the run cut short."""
    names = sorted(folder.name.removeprefix(UNFINISHED_PREFIX) for folder in found.parent.glob(f"{UNFINISHED_PREFIX}*"))
    return [f"{name}: it was being written when the run ended" for name in names if name > found.name]


def _named_checkpoint(run_folder: Path, folder: Path, known_damage: Mapping[Path, str]) -> Path:
    if not (folder / MANIFEST_FILE).is_file():
        missing = f"it holds no {MANIFEST_FILE}" if folder.is_dir() else "there is no such folder"
        complete = list_checkpoints(run_folder)
        there = "there are " + ", ".join(each.name for each in complete[-3:]) if complete else "there is none yet"
        raise UserError(
            f"resume ({folder}) must be 'latest' or a complete checkpoint folder such as "
            f"{run_folder / CHECKPOINTS_FOLDER / step_folder_name(1000)}; {missing}. In {run_folder} {there} "
            "(--save_total_limit removes the oldest)."
        )
    if folder.name.startswith(SUPERSEDED_PREFIX):
        name = folder.name.removeprefix(SUPERSEDED_PREFIX)
        raise UserError(
            f"resume ({folder}) was set aside when the run went on from an earlier checkpoint; to go back to it, move "
            f"the step folders made since then elsewhere and rename it to {name}."
        )
    problem = known_damage.get(folder) or _damage(folder)
    if problem is not None:
        raise UserError(f"checkpoint {folder} is damaged: {problem}; pass an older one, or --resume latest.")
    return folder


def _damage(folder: Path) -> str | None:
    """What can be said against a checkpoint without reading its large files."""
    return find_damage(folder, checksums=False) or (
        f"{TRAINER_STATE_FILE} is not readable" if _state_content(folder) is None else None
    )


def _state_content(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "version" in content else None


def verify_together(folder: Path, engine: Engine) -> str | None:
    """What is wrong with a checkpoint, every byte of it, or None; ranks share the reading and get the same answer.

    DeepSpeed (0.19.8) loads with `weights_only=False`, which runs what a pickle asks for: so they are looked at first.
    """
    damage = find_damage(folder, checksums=True, rank=engine.rank, world_size=engine.world_size)
    shards = sorted((folder / DEEPSPEED_FOLDER).glob("*.pt"))[engine.rank :: engine.world_size]
    found = engine.gather(damage or _refused(shards))
    return next((problem for problem in found if problem is not None), None)


def _refused(shards: Sequence[Path]) -> str | None:
    try:
        for shard in shards:
            safe_load(shard)
    except ConversionError as error:
        return str(error)
    return None


def read_state(folder: Path) -> TrainerState:
    """Trainer state of a checkpoint that `find_checkpoint` found. Raises `UserError` where another program wrote it."""
    content = _state_content(folder) or {}
    names = {field.name for field in dataclasses.fields(TrainerState)}
    if content.get("version") != STATE_VERSION or not names.issuperset(content):
        raise UserError(
            f"checkpoint {folder} has trainer state version {content.get('version')}, this program reads "
            f"{STATE_VERSION}; resume it with the version that wrote it."
        )
    return TrainerState(**content)
