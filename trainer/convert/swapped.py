"""Flat tensors that a run kept on NVMe: raw fp32 files beside the shards of a checkpoint."""

import re
from pathlib import Path
from typing import Any

from trainer.convert.errors import ConversionError
from trainer.convert.safe_load import StoredTensor
from trainer.convert.stream import Extent
from trainer.layout import SWAPPED_KEY, swapped_folder

_FILE_NAME = re.compile(r"[\w-]+")
SwappedGroups = dict[int, tuple[str, int]]
"""Number of a group -> name and length of its files."""


def noted_groups(model: dict[str, Any]) -> SwappedGroups:
    """The groups on NVMe that our trainer noted in a rank's model states; empty where there were none."""
    return {number: tuple(group) for number, group in enumerate(model.get(SWAPPED_KEY) or ()) if group is not None}


def read_swapped(folder: Path, rank: int, group: tuple[str, int], moment: str | None = None) -> StoredTensor:
    """The flat weights of a group, or one of its moments; nothing of them is read yet. Raises `ConversionError`."""
    name, numel = group
    if type(numel) is not int or not _FILE_NAME.fullmatch(name):
        raise ConversionError(f"{folder}: a group on NVMe is noted as {group}, which is no name and length.")
    path = folder / swapped_folder(rank) / (f"{name}.tensor.swp" if moment is None else f"{moment}-{name}.tensor.swp")
    if not path.is_file() or path.stat().st_size < 4 * numel:
        problem = "is too short" if path.is_file() else "is missing"
        raise ConversionError(f"{path}: {problem}; copy the checkpoint again, with the files of all machines.")
    return StoredTensor((numel,), "float32", Extent(path, 0, 4 * numel))
