"""Reads weights block by block, on all cores, in memory that does not grow with the model."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

from trainer.convert.errors import ConversionError

BLOCK_BYTES = 1 << 19  # what is read and what is compared with it stay within a core's cache
MAX_THREADS = 8  # beyond that disks and memory are the limit
T = TypeVar("T")


class Extent(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    path: Path
    start: int
    stop: int


class OpenFiles:
    """Files that are read from, each opened once. Use it as a context: it closes them."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, path: Path, start: int, into: memoryview) -> None:
        """Fill a buffer of bytes with those of a file from `start` on.

        Raises:
            ConversionError: the file ends before that.
        """
        descriptor = self._descriptor(path)
        while into:
            count = os.preadv(descriptor, [into], start)
            if count == 0:
                raise ConversionError(f"{path}: ends at byte {start}; it was cut short while it was read.")
            into, start = into[count:], start + count

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            # Two threads may both come here; `setdefault` keeps one of their descriptors.
            opened = os.open(path, os.O_RDONLY)
            if (kept := self._descriptors.setdefault(path, opened)) != opened:
                os.close(opened)
            return kept
        return self._descriptors[path]


def blocks(extent: Extent) -> Iterable[Extent]:
    """An extent cut into pieces of `BLOCK_BYTES`."""
    for start in range(extent.start, extent.stop, BLOCK_BYTES):
        yield extent._replace(start=start, stop=min(start + BLOCK_BYTES, extent.stop))


def on_all_cores(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do `work` for every item on several threads; the first exception is raised, and what has not begun is left."""
    with ThreadPoolExecutor(num_threads()) as pool:
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
