"""Writes weights as safetensors shards, block by block, and publishes a folder whole or not at all.

The shards are written here and not by `safetensors.torch.save_file` because that takes a whole shard in memory;
`safetensors_file.py` tells the format.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from trainer.convert.dtypes import ITEM_BYTES, SAFETENSORS_NAMES, cast
from trainer.convert.errors import ConversionError
from trainer.convert.stream import BLOCK_BYTES, OpenFiles, blocks, on_all_cores
from trainer.convert.weights import Weight, output_dtype
from trainer.layout import STEP_PREFIX, TRAINER_STATE_FILE

UNITS_BYTES = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
INDEX_NAME = "model.safetensors.index.json"


class Shard(NamedTuple):
    """One file of a model folder and the weights it holds, in the order of their bytes."""

    file_name: str
    weights: list[Weight]


def parse_size(max_shard_size: str) -> int:
    """Bytes of a size such as 5GB, 200MB (powers of ten) or 4GiB (of two).

    Raises:
        ConversionError: it is not a positive number with one of these units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", max_shard_size.strip().upper())
    size = int(float(match.group(1)) * UNITS_BYTES[match.group(2)]) if match else 0
    if size < 1:
        raise ConversionError(f"max_shard_size ({max_shard_size}) must be a positive size with a unit, such as 5GB.")
    return size


def plan_shards(weights: Sequence[Weight], dtype: str, max_bytes: int) -> list[Shard]:
    """Fill shards in the order of the weights; a weight larger than `max_bytes` gets a shard of its own."""
    groups: list[list[Weight]] = [[]]
    free = max_bytes
    for weight in weights:
        size = num_bytes(weight, dtype)
        if size > free and groups[-1]:
            groups.append([])
            free = max_bytes
        groups[-1].append(weight)
        free -= size
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [Shard(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, start=1)]


def num_bytes(weight: Weight, dtype: str) -> int:
    """Bytes of a weight once written for a model of type `dtype`."""
    return math.prod(weight.shape) * ITEM_BYTES[output_dtype(weight, dtype)]


def write_shards(folder: Path, shards: Sequence[Shard], dtype: str) -> None:
    """Write the shards and, if there is more than one, their index, as `save_pretrained` lays them out.

    Raises:
        ConversionError: a weight has a type that safetensors files do not have, or a file has become shorter.
    """
    with OpenFiles() as files:
        for shard in shards:
            _write_safetensors(folder / shard.file_name, shard.weights, dtype, files)
    if len(shards) > 1:
        weights = [weight for shard in shards for weight in shard.weights]
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(weight.shape) for weight in weights),
                "total_size": sum(num_bytes(weight, dtype) for weight in weights),
            },
            "weight_map": {weight.name: shard.file_name for shard in shards for weight in shard.weights},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, weights: Sequence[Weight], dtype: str, files: OpenFiles) -> None:
    # Wider types first, so that every tensor starts at a multiple of its element size.
    weights = sorted(weights, key=lambda weight: -ITEM_BYTES[output_dtype(weight, dtype)])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = []
    start = 0
    for weight in weights:
        stop = start + num_bytes(weight, dtype)
        kind = SAFETENSORS_NAMES.get(output_dtype(weight, dtype))
        if kind is None:
            raise ConversionError(f"{weight.name}: {weight.dtype} is not a type of safetensors files.")
        header[weight.name] = {"dtype": kind, "shape": list(weight.shape), "data_offsets": [start, stop]}
        starts.append(start)
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        file.flush()
        first = file.tell()

        def write(item: tuple[Weight, int]) -> None:
            weight, start = item
            _write_weight(file.fileno(), first + start, weight, output_dtype(weight, dtype), files)

        on_all_cores(write, zip(weights, starts, strict=True))


def _write_weight(descriptor: int, position: int, weight: Weight, dtype: str, files: OpenFiles) -> None:
    if weight.dtype != dtype:
        import numpy as np
    # `copy_file_range` and `sendfile` copy pages one by one; through a buffer in the core's cache it takes less time.
    buffer = memoryview(bytearray(min(BLOCK_BYTES, max(weight.num_bytes, 1))))
    for extent in weight.extents:
        for path, start, stop in blocks(extent):
            content = buffer[: stop - start]
            files.read(path, start, content)
            if weight.dtype != dtype:
                content = cast(np.frombuffer(content, np.uint8), weight.dtype, dtype).data
            position += _write_all(descriptor, content, position)


def _write_all(descriptor: int, content: memoryview, position: int) -> int:
    """Write all of `content` at a position of a file; returns its length."""
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], position + written)
    return written


def check_destination(out: Path, checkpoint: Path, *, overwrite: bool) -> None:
    """Refuse an output folder whose replacement would lose something.

    Raises:
        ConversionError: `out` overlaps a checkpoint, is not empty and may not be overwritten, or is no model folder.
    """
    out, checkpoint = out.resolve(), checkpoint.resolve()
    if out == checkpoint or checkpoint in out.parents or out in checkpoint.parents:
        raise ConversionError(f"out ({out}) must lie apart from the checkpoint ({checkpoint}); choose another folder.")
    for folder in (out, *out.parents):  # one of another update, or of another run, which has a config.json too
        if (folder / TRAINER_STATE_FILE).is_file():
            raise ConversionError(f"out ({out}) must lie apart from the checkpoint ({folder}); choose another folder.")
    if out.parent == checkpoint.parent and out.name.startswith(STEP_PREFIX):
        raise ConversionError(f"out ({out}) has the name of a checkpoint among those of the run; choose another name.")
    if out.exists() and not out.is_dir():
        raise ConversionError(f"out ({out}) is a file; choose another folder.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConversionError(f"out ({out}) is not empty; choose another folder or add --overwrite.")
    if not (out / "config.json").is_file():
        raise ConversionError(
            f"out ({out}) is not a model folder (no config.json), so it is not overwritten; choose another."
        )


@contextmanager
def published_folder(out: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A new folder beside `out` to write into; at the end it reaches the disk and takes the place of `out`.

    After an exception the new folder is gone and `out` is as it was. Without `overwrite` that is how a folder ends that
    something was put into meanwhile.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    unique = os.urandom(4).hex()
    staging = out.with_name(f".{out.name}.{unique}.tmp")
    staging.mkdir()
    try:
        yield staging
        for path in [*staging.rglob("*"), staging]:
            _fsync(path)
        if not overwrite:
            os.rename(staging, out)  # over an empty folder at most
        else:
            _replace(staging, out, retired=out.with_name(f".{out.name}.{unique}.old"))
        _fsync(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def flushing(folder: Path) -> Iterator[None]:
    """Send the files of a folder to the disk meanwhile, which keeps `published_folder` from waiting for it."""
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.map(_fsync, list(folder.iterdir()))
        yield
    list(flushed)  # raises what a flush has raised


def _replace(staging: Path, out: Path, *, retired: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        os.rename(staging, out)  # also over an empty folder, at once
        return
    os.rename(out, retired)  # a folder cannot be renamed over one that is not empty
    try:
        os.rename(staging, out)
    except BaseException:
        os.rename(retired, out)
        raise
    shutil.rmtree(retired, ignore_errors=True)  # the new one is in its place, whatever becomes of this


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
