"""Goes through weights block by block, on all cores, in memory that does not grow with the model.

A tensor that is mapped from a file could be read where it lies, but its pages would then count as resident until the
mapping ends. So the bytes are read into a small buffer instead, from where the mapping says they are in the file.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch

from trainer.convert.errors import ConversionError
from trainer.convert.weights import Weight

BLOCK_BYTES = 1 << 21  # source, converted and written block together stay within a core's cache
MAX_THREADS = 8  # beyond that disks and memory are the limit
T = TypeVar("T")


class Extent(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    path: Path
    start: int
    stop: int


class Block(NamedTuple):
    """Consecutive elements of a weight as they are in the checkpoint, and where they lie if that is in a file."""

    values: torch.Tensor  # [N]
    extent: Extent | None


class Mapping(NamedTuple):
    """A part of this process' memory that shows a file: addresses `start` to `stop`, from `offset` of the file on."""

    start: int
    stop: int
    offset: int
    path: Path


class BlockReader:
    """Reads weights from their files. Use it as a context: it keeps the files open."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._mappings: list[Mapping] = []

    def __enter__(self) -> "BlockReader":
        self._mappings = mapped_files()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def blocks(self, weight: Weight) -> Iterator[Block]:
        """The elements of a weight, in order; a block's memory is used again for the next one.

        Raises:
            ConversionError: a file has become shorter.
        """
        for part in weight.slices or (weight.read().reshape(-1),):
            extent = self._locate(part)
            numel = BLOCK_BYTES // part.itemsize
            if extent is None:
                yield from (Block(block, None) for block in part.split(numel) if len(block))
                continue
            buffer = torch.empty(min(numel, part.numel()), dtype=part.dtype)
            for start in range(extent.start, extent.stop, BLOCK_BYTES):
                stop = min(start + BLOCK_BYTES, extent.stop)
                values = buffer[: (stop - start) // part.itemsize]
                read_exactly(self._descriptor(extent.path), values, start, extent.path)
                yield Block(values, Extent(extent.path, start, stop))

    def _locate(self, part: torch.Tensor) -> Extent | None:
        """Where a contiguous tensor lies in a file; None if in memory of its own, or if the system does not tell."""
        address, size = part.data_ptr(), part.numel() * part.itemsize
        for mapping in self._mappings:
            if size and mapping.start <= address and address + size <= mapping.stop:
                start = mapping.offset + address - mapping.start
                return Extent(mapping.path, start, start + size)
        return None

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            # Two threads may both come here; `setdefault` keeps one of their descriptors.
            opened = os.open(path, os.O_RDONLY)
            if (kept := self._files.setdefault(path, opened)) != opened:
                os.close(opened)
            return kept
        return self._files[path]


def mapped_files() -> list[Mapping]:
    """The files of which this process sees parts as memory. Empty where there is no /proc (not Linux)."""
    try:
        lines = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, _, offset, _, inode, *name = line.split(maxsplit=5)
        if inode != b"0" and name:
            start, stop = (int(address, 16) for address in addresses.split(b"-"))
            found.append(Mapping(start, stop, int(offset, 16), Path(os.fsdecode(name[0]))))
    # A name that is written otherwise there (one with a line break) is no file; such weights are read where they lie.
    return [mapping for mapping in found if mapping.path.suffix in (".pt", ".safetensors") and mapping.path.is_file()]


def read_exactly(descriptor: int, values: torch.Tensor, start: int, path: Path) -> None:
    """Fill a contiguous tensor with the bytes of a file from `start` on.

    Raises:
        ConversionError: the file ends before that.
    """
    view = values.view(torch.uint8).numpy().data
    while view:
        count = os.preadv(descriptor, [view], start)
        if count == 0:
            raise ConversionError(f"{path}: ends at byte {start}; it was cut short while it was read.")
        view, start = view[count:], start + count


def on_all_cores(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do `work` for every item on several threads; the first exception is raised, and what has not begun is left."""
    with ThreadPoolExecutor(num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def num_threads() -> int:
    """Cores that this process may use, up to `MAX_THREADS`."""
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)
