"""Read the headers of a source's utterances, in parallel, once: what an interrupted or an older index has is kept."""

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from tqdm import tqdm

from trainer.data.audio import AudioError, ByteRange, read_num_samples
from trainer.data.index_store import IndexFile
from trainer.data.rows import Listing, Row
from trainer.data.workers import init_worker, start_fork_server

_CHUNK_ROWS = 512
# Rows per task: a header takes 0.02 to 0.2 ms, so tasks of single rows would mostly pay for the queue.
_NUM_THREADS = 16
# On a network file system the time goes into waiting, which threads overlap, in each process too.
_THREAD_ROWS = _CHUNK_ROWS // _NUM_THREADS
_FEW_ROWS = 20_000
# As many headers are read by one process before others have started.
_JOURNAL = pa.schema(
    [("key", pa.large_string()), ("length", pa.int64()), ("mtime_ns", pa.int64()), ("num_samples", pa.int64())]
)

Known = dict[tuple[str, int, int], int]
"""Length in samples by (key, bytes, modification time) of utterances whose header was read before."""


class Header(NamedTuple):
    """What the header of one row says: its length in 16 kHz samples, or why there is none."""

    num_samples: int
    reason: str | None


def read_headers(
    listing: Listing, root: str, index: Path, *, progress: bool, num_processes: int | None, rebuild: bool
) -> tuple[list[Header], int]:
    """Length of every row, in the order of the listing.

    What was read is noted beside ``index`` while it goes on, so that after a kill the next call reads only the rest; so
    it does where an older index has the same files. Rows that could not be read are always tried again.

    Args:
        root: folder that the names of the listing are relative to.
        progress: show a progress bar on standard error.
        num_processes: None for one per core.
        rebuild: read all headers, whatever is known.

    Returns:
        The headers, and how many of them were known before.
    """
    known: Known = {} if rebuild else {**_from_index(index), **_from_journals(index)}
    headers: list[Header | None] = [None] * len(listing.rows)
    unknown, num_known = [], 0
    for number, row in enumerate(listing.rows):
        if row.reason is not None:
            headers[number] = Header(0, row.reason)
        elif num_samples := known.get((_key(listing, row), row.length, row.mtime_ns)):
            headers[number] = Header(num_samples, None)
            num_known += 1
        else:
            unknown.append(number)
    chunks = [unknown[first : first + _CHUNK_ROWS] for first in range(0, len(unknown), _CHUNK_ROWS)]
    bar = tqdm(
        total=len(listing.rows), initial=len(listing.rows) - len(unknown), desc="reading headers", unit="file",
        disable=not progress, file=sys.stderr,
    )  # fmt: skip
    with bar, _journal(index) as journal, _executor(len(unknown), num_processes) as executor:
        for chunk, found in _read_chunks(executor, listing, root, chunks):
            for number, header in zip(chunk, found, strict=True):
                headers[number] = header
            _note(journal, listing, chunk, found)
            bar.update(len(chunk))
    return [header for header in headers if header is not None], num_known


def forget_journals(index: Path) -> None:
    """Remove the notes of ``read_headers``, once the index is written."""
    for journal in _journals(index):
        journal.unlink(missing_ok=True)


def _journals(index: Path) -> Iterable[Path]:
    return index.parent.glob(f"{index.stem}.*.partial")


def _key(listing: Listing, row: Row) -> str:
    return row.name if row.container < 0 else f"{listing.containers[row.container]}\0{row.offset}"


def _from_index(index: Path) -> Known:
    try:
        file = IndexFile(str(index))
    except (OSError, ValueError, pa.ArrowException):
        return {}
    table, containers = file.table, file.header["containers"]
    columns = ("name", "container", "offset", "length", "mtime_ns", "num_samples")
    known = {}
    for name, container, offset, length, mtime_ns, num_samples in zip(
        *(table[column].to_pylist() for column in columns), strict=True
    ):
        if num_samples:
            key = name if container < 0 else f"{containers[container]}\0{offset}"
            known[key, length, mtime_ns] = num_samples
    return known


def _from_journals(index: Path) -> Known:
    known: Known = {}
    for journal in _journals(index):
        try:
            with pa.OSFile(str(journal)) as file:
                for batch in pa.ipc.open_stream(file):
                    *key, num_samples = (column.to_pylist() for column in batch.columns)
                    known.update(zip(zip(*key, strict=True), num_samples, strict=True))
        except (OSError, pa.ArrowException):
            continue  # its last lines were not finished
    return known


@contextmanager
def _journal(index: Path) -> Iterator[pa.RecordBatchStreamWriter]:
    """Of this process alone: where a file system cannot lock, several may be at it."""
    index.parent.mkdir(parents=True, exist_ok=True)
    path = index.with_name(f"{index.stem}.{socket.gethostname()}-{os.getpid()}.partial")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _JOURNAL) as writer:
        yield writer


def _note(journal: pa.RecordBatchStreamWriter, listing: Listing, chunk: list[int], found: list[Header]) -> None:
    rows = [listing.rows[number] for number, header in zip(chunk, found, strict=True) if header.num_samples]
    if rows:
        columns = [
            [_key(listing, row) for row in rows],
            [row.length for row in rows],
            [row.mtime_ns for row in rows],
            [header.num_samples for header in found if header.num_samples],
        ]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, _JOURNAL, strict=True)]
        journal.write_batch(pa.record_batch(arrays, schema=_JOURNAL))


@contextmanager
def _executor(num_rows: int, num_processes: int | None) -> Iterator[Executor]:
    count = num_processes or len(os.sched_getaffinity(0))
    executor: Executor
    if num_rows < _FEW_ROWS or count == 1:
        executor = ThreadPoolExecutor(_NUM_THREADS)
    else:
        start_fork_server(preload=__name__)
        executor = ProcessPoolExecutor(count, get_context("forkserver"), initializer=init_worker, initargs=(0,))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _read_chunks(
    executor: Executor, listing: Listing, root: str, chunks: list[list[int]]
) -> Iterator[tuple[list[int], list[Header]]]:
    """Chunks as they are done, with what was found."""
    futures: dict[Future[list[Header]], list[int]] = {}
    for chunk in chunks:
        places = [_place(listing, root, listing.rows[number]) for number in chunk]
        futures[executor.submit(_read_chunk, places, isinstance(executor, ProcessPoolExecutor))] = chunk
    for future in as_completed(futures):
        yield futures[future], future.result()


def _place(listing: Listing, root: str, row: Row) -> str | ByteRange:
    if row.container < 0:
        return os.path.join(root, row.name)
    return ByteRange(os.path.join(root, listing.containers[row.container]), row.offset, row.length)


def _read_chunk(places: list[str | ByteRange], in_threads: bool) -> list[Header]:
    if not in_threads:
        return [_read_header(place) for place in places]
    shares = [places[first : first + _THREAD_ROWS] for first in range(0, len(places), _THREAD_ROWS)]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return [header for share in threads.map(_read_chunk, shares, [False] * len(shares)) for header in share]


def _read_header(place: str | ByteRange) -> Header:
    try:
        return Header(read_num_samples(place), None)
    except AudioError as error:
        return Header(0, error.reason)
