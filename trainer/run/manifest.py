"""What a checkpoint holds: size and CRC-32 of every file, listed when it is saved and compared when it is resumed.

A checkpoint of many gigabytes is read on both occasions, so ranks share its files out among themselves.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.layout import MANIFEST_FILE, is_inside

MANIFEST_VERSION = 1
_BLOCK_BYTES = 1 << 22
# Files that are read before ranks meet, such as the model's configuration, are smaller.
_SMALL_BYTES = 1 << 20


def share_of(sizes: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """The files that `rank` reads: the largest first, each to whoever has least, the same division on every rank."""
    loads = [0] * world_size
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        reader = loads.index(min(loads))
        loads[reader] += sizes[name]
        if reader == rank:
            mine.append(name)
    return mine


def describe_files(folder: Path, rank: int = 0, world_size: int = 1) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of this rank's share of the files below `folder`, by relative path; each is flushed to disk."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {name: _describe(folder / name) for name in sorted(share_of(sizes, rank, world_size))}


def _describe(path: Path) -> dict[str, int]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """List `files` in the manifest of `folder`, and flush it and every folder below to disk."""
    write_json(folder / MANIFEST_FILE, {"version": MANIFEST_VERSION, "files": dict(sorted(files.items()))})
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        flush(inner)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file and flush it to disk."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    flush(path)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, dict[str, int]] | None:
    """Size and CRC-32 by relative path as the manifest lists them; None where there is none that can be read."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        if not all(is_inside(name) for name in files):
            return None
        return {str(name): {"bytes": int(it["bytes"]), "crc32": int(it["crc32"])} for name, it in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def checkpoint_bytes(folder: Path) -> int | None:
    """Size of all listed files together; None without a manifest."""
    files = read_manifest(folder)
    return None if files is None else sum(described["bytes"] for described in files.values())


def find_damage(folder: Path, *, checksums: bool, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, or None.

    Compared are the sizes of all files, CRC-32 of the small ones and, if `checksums`, of this rank's share of the rest.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return f"it holds no {MANIFEST_FILE}"
    files = read_manifest(folder)
    if files is None:
        return f"{MANIFEST_FILE} is not readable"
    for name, described in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
        if size != described["bytes"]:
            return f"{name} is {size:,} bytes long, not {described['bytes']:,}"
    sizes = {name: described["bytes"] for name, described in files.items()}
    small = [name for name, size in sizes.items() if size < _SMALL_BYTES]
    for name in [*small, *(share_of(sizes, rank, world_size) if checksums else [])]:
        try:
            same = _crc32(folder / name) == files[name]["crc32"]
        except OSError as error:
            return f"{name}: {error.strerror}"
        if not same:
            return f"{name} does not have the checksum in {MANIFEST_FILE}"
    return None
