"""The list of utterances: where each one is and how long. Read from headers once, kept as Parquet."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from trainer.data.audio import SAMPLE_RATE, AudioError, read_num_samples
from trainer.data.sources import find_audio_files
from trainer.errors import UserError

_FORMAT = "1"
# Raise when the columns or the meaning of num_samples change: older caches are then rebuilt.
_CHUNK_FILES = 64
# Files per task: one header takes about 0.1 ms, so single-file tasks would mostly pay for the queue.
_NUM_THREADS = 16
# More than cores: on a network file system the time goes into waiting, which threads overlap. On a local disk neither
# threads nor processes are faster than one thread, as most of a header's 0.1 ms is spent in Python.


class DataError(UserError):
    """The user's data cannot be trained on; the message names the setting, its value, the rule and the remedy."""


class Skipped(NamedTuple):
    """A file left out, and why in a few words."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class AudioIndex:
    """Utterances by row number."""

    root: str
    """Absolute path of the folder that ``paths`` are relative to."""
    paths: pa.StringArray
    """Relative paths with forward slashes, length [num_rows]."""
    num_samples: npt.NDArray[np.int64]
    """Length of each utterance in 16 kHz samples, shape [num_rows]."""
    ids: npt.NDArray[np.int64]
    """Number of each utterance in the whole folder, shape [num_rows]: kept by every selection, it seeds the masks."""

    def __len__(self) -> int:
        return len(self.num_samples)

    @property
    def hours(self) -> float:
        """Length of all utterances together, in hours."""
        return float(self.num_samples.sum()) / SAMPLE_RATE / 3600

    def path(self, row: int) -> str:
        """Absolute path of one utterance's file."""
        return os.path.join(self.root, self.paths[row].as_py())

    def take(self, rows: npt.NDArray[np.intp]) -> "AudioIndex":
        """The given rows, in the given order."""
        return AudioIndex(self.root, self.paths.take(pa.array(rows)), self.num_samples[rows], self.ids[rows])


def build_index(
    folder: str, cache_dir: str, progress: bool, rebuild: bool = False, flag: str = "dataset_name"
) -> tuple[AudioIndex, list[Skipped]]:
    """List the audio files under ``folder`` with their lengths, from the cache where no file has changed.

    The cache is ``cache_dir/<hash of the absolute folder path>.parquet``. It is used again while the relative path,
    size and modification time of every file are as they were, and rebuilt otherwise. It appears complete or not at all.

    Args:
        folder: searched at any depth, see ``find_audio_files``.
        cache_dir: created if missing.
        progress: show a progress bar on standard error while headers are read.
        rebuild: read the headers again even where no file has changed.
        flag: the setting that named the folder, for error messages.

    Returns:
        The index, sorted by path, and the files whose header could not be used.

    Raises:
        DataError: no such folder, no audio file in it, or none that can be read.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        raise DataError(f"{flag} ({folder}) must be an existing folder of audio files; check the path.")
    files = find_audio_files(root)
    if not files:
        raise DataError(f"{flag} ({folder}) must hold audio files (wav, flac, ogg, mp3, ...); none was found.")
    cache = Path(cache_dir) / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.parquet"
    fingerprint = _fingerprint(root, files)
    table = None if rebuild else _read_cache(cache, fingerprint)
    if table is None:
        table = _read_headers(root, files, progress)
        _write_cache(table, cache, fingerprint)
    usable = np.flatnonzero(table["reason"].is_null().to_numpy())
    broken = table.filter(table["reason"].is_valid())
    skipped = [
        Skipped(os.path.join(root, path), reason)
        for path, reason in zip(broken["path"].to_pylist(), broken["reason"].to_pylist(), strict=True)
    ]
    if len(usable) == 0:
        raise DataError(
            f"{flag} ({folder}) must hold audio files that can be read; all {len(files)} found cannot. "
            f"First: {skipped[0].path} ({skipped[0].reason})."
        )
    paths = table["path"].combine_chunks().take(pa.array(usable))
    return AudioIndex(root, paths, table["num_samples"].to_numpy()[usable], np.arange(len(usable))), skipped


def filter_by_duration(index: AudioIndex, min_seconds: float) -> tuple[AudioIndex, int]:
    """Drop utterances shorter than ``min_seconds``. Long ones stay: their batches crop them.

    Returns:
        The utterances kept and the number dropped.

    Raises:
        DataError: nothing is long enough.
    """
    rows = np.flatnonzero(index.num_samples >= min_seconds * SAMPLE_RATE)
    if len(rows) == 0:
        longest = float(index.num_samples.max()) / SAMPLE_RATE
        raise DataError(
            f"min_duration_in_seconds ({min_seconds}) must not exceed the longest utterance "
            f"({longest:.2f} s, of {len(index)} in {index.root}); lower it."
        )
    return index.take(rows), len(index) - len(rows)


def split_validation(index: AudioIndex, percentage: float, seed: int) -> tuple[AudioIndex, AudioIndex]:
    """Set ``percentage`` % of the utterances aside, at least one if there are two and the percentage is above 0.

    The draw goes by utterance id, so another minimum duration hardly moves utterances from one side to the other.

    Returns:
        The utterances to train on (at least one) and those to validate on, both in the order of the index.
    """
    num_validation = round(len(index) * percentage / 100)
    if percentage > 0:
        num_validation = min(max(num_validation, 1), len(index) - 1)
    draws = np.random.default_rng(seed).random(int(index.ids.max()) + 1)[index.ids]
    order = np.argsort(draws, kind="stable")
    return index.take(np.sort(order[num_validation:])), index.take(np.sort(order[:num_validation]))


def _fingerprint(root: str, files: list[str]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for file in files:
        try:
            status = os.stat(os.path.join(root, file))
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # a dangling link; its header fails too and says so
            stamp = "missing"
        digest.update(os.fsencode(file) + b"\0" + stamp.encode() + b"\0")
    return digest.hexdigest()


def _read_cache(cache: Path, fingerprint: str) -> pa.Table | None:
    """The cached table, or None where there is none, it is damaged, or the files have changed."""
    try:
        table = pq.read_table(cache)
    except (OSError, pa.ArrowException):
        return None
    return table if (table.schema.metadata or {}).get(b"fingerprint") == fingerprint.encode() else None


def _write_cache(table: pa.Table, cache: Path, fingerprint: str) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    pq.write_table(table.replace_schema_metadata({"fingerprint": fingerprint}), temporary)
    os.replace(temporary, cache)


def _read_headers(root: str, files: list[str], progress: bool) -> pa.Table:
    """One row per file: path, num_samples (0 if unusable), reason (null if usable)."""
    chunks = [files[first : first + _CHUNK_FILES] for first in range(0, len(files), _CHUNK_FILES)]
    rows: list[tuple[str, int, str | None]] = []
    bar = tqdm(total=len(files), desc="reading headers", unit="file", disable=not progress, file=sys.stderr)
    with bar, ThreadPoolExecutor(_NUM_THREADS) as pool:
        for chunk in pool.map(lambda chunk: [_read_header(root, file) for file in chunk], chunks):
            rows += chunk
            bar.update(len(chunk))
    paths, num_samples, reasons = zip(*rows, strict=True)
    return pa.table(
        {
            "path": pa.array(paths, pa.string()),
            "num_samples": pa.array(num_samples, pa.int64()),
            "reason": pa.array(reasons, pa.string()),
        }
    )


def _read_header(root: str, file: str) -> tuple[str, int, str | None]:
    try:
        file.encode()
    except UnicodeEncodeError:  # Parquet holds UTF-8 only
        return os.fsencode(file).decode(errors="replace"), 0, "file name not UTF-8"
    try:
        return file, read_num_samples(os.path.join(root, file)), None
    except AudioError as error:
        return file, 0, error.reason
