"""Finds the checkpoint to convert in a run folder and makes sure it is whole."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from trainer.convert.archive import file_crc32, plain_crc32
from trainer.convert.errors import ConversionError
from trainer.layout import (
    CHECKPOINTS_FOLDER,
    DEEPSPEED_FOLDER,
    MANIFEST_FILE,
    PLAIN_MODEL_FILE,
    STEP_PREFIX,
    TRAINER_STATE_FILE,
    is_inside,
)

LAYOUT_VERSION = 1
WEIGHTS = {"deepspeed": DEEPSPEED_FOLDER, "plain": PLAIN_MODEL_FILE}
STEP_FOLDER = re.compile(re.escape(STEP_PREFIX) + r"(\d+)")


class Checkpoint(NamedTuple):
    """What is known of one complete checkpoint before its weights are read.

    `weights` is the folder of one DeepSpeed tag or, of the `plain` engine, a safetensors file; `configuration` is the
    folder with `config.json`.
    """

    folder: Path
    step: int
    world_size: int
    engine: str
    weights: Path
    configuration: Path


def find_checkpoint(source: Path) -> Path:
    """The step folder that `source` is, or the newest complete one of the run folder that `source` is.

    Raises:
        ConversionError: there is none.
    """
    if not source.is_dir():
        raise ConversionError(f"checkpoint ({source}) is not a folder; give a run folder or one of its step folders.")
    if STEP_FOLDER.fullmatch(source.resolve().name) or (source / TRAINER_STATE_FILE).exists():
        return source
    checkpoints = source / CHECKPOINTS_FOLDER if (source / CHECKPOINTS_FOLDER).is_dir() else source
    steps = {
        int(match.group(1)): folder
        for folder in checkpoints.iterdir()
        if (match := STEP_FOLDER.fullmatch(folder.name)) and (folder / MANIFEST_FILE).is_file()
    }
    if not steps:
        raise ConversionError(
            f"{checkpoints}: holds no complete checkpoint (a folder step-<number> with manifest.json); "
            "wait until the run has saved once, or give another folder."
        )
    return steps[max(steps)]


def open_checkpoint(folder: Path, *, checksums: bool, tensors: bool = False) -> Checkpoint:
    """Check every file that the manifest lists (size, and CRC-32 if `checksums`) and read the trainer's state.

    The CRC-32 of files of torch is checked without reading their tensors, unless `tensors` asks for every byte:
    `check_written` checks those it compares.

    Raises:
        ConversionError: the folder is an unfinished save, a file is missing or damaged, or the layout is unknown.
    """
    if folder.resolve().name.startswith((".", "tmp")) or not (folder / MANIFEST_FILE).is_file():
        raise ConversionError(
            f"{folder}: an unfinished save (no manifest.json, or a temporary name); take another one."
        )
    files = _field(folder / MANIFEST_FILE, read_layout(folder / MANIFEST_FILE), "files", dict)
    for name, facts in files.items():
        if not isinstance(facts, dict) or "bytes" not in facts or not is_inside(name):
            raise ConversionError(f"{folder / MANIFEST_FILE}: a damaged entry ({name}: {facts}); take another one.")
        _check_file(folder / name, facts, checksums=checksums, tensors=tensors)
    path = folder / TRAINER_STATE_FILE
    state = read_layout(path)
    engine = _field(path, state, "engine", str)
    if engine not in WEIGHTS:
        raise ConversionError(
            f"{path}: engine ({engine}) must be one of {', '.join(WEIGHTS)}; "
            "convert with the version of the trainer that wrote the checkpoint."
        )
    return Checkpoint(
        folder=folder,
        step=_field(path, state, "step", int),
        world_size=_field(path, state, "world_size", int),
        engine=engine,
        weights=folder / WEIGHTS[engine],
        configuration=folder,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: missing; copy the whole checkpoint folder.") from error
    except (ValueError, OSError) as error:
        raise ConversionError(f"{path}: not readable as JSON ({error}); take another checkpoint.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds a {type(content).__name__}, not a JSON object; take another checkpoint.")
    return content


def read_layout(path: Path) -> dict[str, Any]:
    """`read_json` for one of the trainer's own files, which carry the version of their layout."""
    content = read_json(path)
    if content.get("version") != LAYOUT_VERSION:
        raise ConversionError(
            f"{path}: version ({content.get('version')}) must be {LAYOUT_VERSION}; "
            "convert with the version of the trainer that wrote the checkpoint."
        )
    return content


def _field(path: Path, content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        raise ConversionError(f"{path}: {name} ({value!r}) must be of type {kind.__name__}; take another checkpoint.")
    return value


def _check_file(path: Path, facts: dict[str, Any], *, checksums: bool, tensors: bool) -> None:
    if not path.is_file():
        raise ConversionError(f"{path}: listed in manifest.json but missing; copy the whole checkpoint folder.")
    num_bytes = path.stat().st_size
    if num_bytes != facts["bytes"]:
        raise ConversionError(
            f"{path}: has {num_bytes} bytes where manifest.json says {facts['bytes']}; copy it again, or take another "
            "checkpoint."
        )
    # Where torch was told not to compute them (`set_crc32_options`), an archive holds other numbers: read all of it.
    expected = facts.get("crc32")
    if not checksums or expected is None or (not tensors and file_crc32(path) == expected):
        return
    if (crc := plain_crc32(path)) != expected:
        raise ConversionError(
            f"{path}: CRC-32 is {crc} where manifest.json says {expected}; copy it again, or take another checkpoint."
        )
