"""tar shards, as WebDataset writes them: each audio member is read from where it lies, so order is free."""

import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from trainer.data.rows import Listing, Request, Row, Source, Stamp, checked_row

_NUM_THREADS = 16
# A shard is read header by header: on a network file system that is waiting, which threads overlap.

_DAMAGED = (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, MemoryError, RecursionError)
# What tarfile raises for damaged headers: it believes the numbers in them.


def tar_source(request: Request, shards: list[str], is_audio: Callable[[str], bool]) -> Source:
    """The audio members of uncompressed tar files, shard by shard in the order of their names.

    Other members (text, JSON) are passed over.
    """
    paths = [os.path.abspath(shard) for shard in shards]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    stamps = []
    for path in paths:
        status = os.stat(path)
        stamps.append(Stamp(os.path.relpath(path, root), status.st_size, status.st_mtime_ns))
    name = os.path.basename(os.path.abspath(request.name)) if os.path.isdir(request.name) else os.path.basename(root)
    label = os.path.splitext(os.path.basename(paths[0]))[0] if len(paths) == 1 else name

    def shard_rows(number: int) -> list[Row]:
        return list(_members(root, number, stamps[number], is_audio))

    def read() -> Listing:
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            rows = [row for shard in threads.map(shard_rows, range(len(stamps))) for row in shard]
        return Listing(rows, [stamp.path for stamp in stamps])

    return Source(request.name, label, root, f"tar {os.path.abspath(request.name)}", stamps, read)


def _members(root: str, number: int, stamp: Stamp, is_audio: Callable[[str], bool]) -> Iterator[Row]:
    try:
        with tarfile.open(os.path.join(root, stamp.path), "r:", encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
                if archive.offset <= member.offset:  # a size below 0: Python before 3.13.6 goes round in circles
                    raise tarfile.ReadError("negative size")
                if not member.isreg() or member.issparse() or not is_audio(member.name):
                    continue
                row = Row(member.name, number, member.offset_data, member.size, stamp.mtime_ns)
                if member.offset_data + member.size > stamp.size:
                    row = row._replace(length=0, reason="truncated or damaged")  # the size may be any number
                yield checked_row(row)
    except _DAMAGED:
        yield Row("(rest of the shard)", number, mtime_ns=stamp.mtime_ns, reason="damaged tar file")
