"""Checkpoints that other trainers saved through DeepSpeed, with accelerate's `save_state` or without it."""

from pathlib import Path

from trainer.convert.checkpoint import Checkpoint
from trainer.convert.errors import ConversionError
from trainer.convert.zero import describe_save
from trainer.layout import STEP_PREFIX, SUPERSEDED_PREFIX, TRAINER_STATE_FILE, UNFINISHED_PREFIX

SHARDS = "*_optim_states.pt"
LATEST_FILE = "latest"  # DeepSpeed notes the tag of the newest save in it
OWN_NAMES = (STEP_PREFIX, SUPERSEDED_PREFIX, UNFINISHED_PREFIX, "tmp")


def find_foreign(source: Path) -> Path | None:
    """The folder of shards that `source` is or that it holds (a DeepSpeed tag); None if this is not such a checkpoint.

    Raises:
        ConversionError: it holds several and does not say which is meant.
    """
    if not source.is_dir() or source.resolve().name.startswith(OWN_NAMES) or (source / TRAINER_STATE_FILE).exists():
        return None
    if any(source.glob(SHARDS)):
        return source
    tags = sorted({path.parent for path in source.glob(f"*/{SHARDS}")})
    latest = source / LATEST_FILE
    if latest.is_file():
        named = latest.read_text(encoding="utf-8", errors="replace").strip()
        for tag in tags:
            if tag.name == named:
                return tag
        raise ConversionError(f"{latest}: names {named!r}, which holds no {SHARDS}; copy that folder too, or give one.")
    if len(tags) > 1:
        raise ConversionError(
            f"{source}: holds the checkpoints {', '.join(tag.name for tag in tags)} and no file named {LATEST_FILE}; "
            "give one of them."
        )
    return tags[0] if tags else None


def open_foreign(tag: Path) -> Checkpoint:
    """What a folder of shards tells of itself. Its configuration may lie in it or in one of the two folders above.

    Raises:
        ConversionError: a file is unreadable, or there are none of the model.
    """
    world_size, step = describe_save(tag)
    above = (tag, tag.resolve().parent, tag.resolve().parent.parent)
    configuration = next((folder for folder in above if (folder / "config.json").is_file()), tag)
    return Checkpoint(
        folder=tag, step=step, world_size=world_size, engine="deepspeed", weights=tag, configuration=configuration
    )
