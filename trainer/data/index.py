"""The list of utterances: where each one is and how long. Read from headers once, kept as a file that is mapped."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.data.audio import SAMPLE_RATE, Place
from trainer.data.index_build import Header, forget_journals, read_headers
from trainer.data.index_store import IndexFile, write_index
from trainer.data.rows import DataError, Listing, Request, Skipped, Source
from trainer.data.sources import open_source

__all__ = [
    "AudioIndex", "DataError", "Skipped", "build_index", "built_since", "concatenate", "filter_by_duration",
    "find_index", "split_validation",
]  # fmt: skip

_FORMAT = "2"
# Raise when the columns or the meaning of num_samples change: older files are then built again.
_MAX_LANGUAGES = 10_000


@dataclass(frozen=True, eq=False)
class AudioIndex:
    """Utterances by row number."""

    root: str
    """What they come from, for messages: absolute path of the folder, or names of several sources."""
    files: tuple[IndexFile, ...]
    """The index of each source, mapped into memory."""
    num_samples: npt.NDArray[np.int64]
    """Length of each utterance in 16 kHz samples, shape [num_rows]."""
    ids: npt.NDArray[np.int64]
    """Number of each utterance among the usable ones of all sources, shape [num_rows].

    Kept by every selection; it seeds the masks.
    """
    tags: npt.NDArray[np.int16]
    """Language and source of each utterance as a number in ``tag_names``, shape [num_rows]."""
    tag_names: list[str]
    tag_sources: list[int]
    """Number of the source of each tag, length of ``tag_names``."""

    def __len__(self) -> int:
        return len(self.num_samples)

    @property
    def hours(self) -> float:
        """Length of all utterances together, in hours."""
        return float(self.num_samples.sum()) / SAMPLE_RATE / 3600

    def place(self, row: int) -> Place:
        """Where to read one utterance."""
        file, position = self._find(row)
        return file.place(position)

    def path(self, row: int) -> str:
        """One utterance for a person: the absolute path of its file, or that of a container and the name in it."""
        file, position = self._find(row)
        return file.shown(position)

    def _find(self, row: int) -> tuple[IndexFile, int]:
        number = int(self.ids[row])
        for file in self.files:
            if number < len(file.usable):
                return file, int(file.usable[number])
            number -= len(file.usable)
        raise IndexError(row)

    def take(self, rows: npt.NDArray[np.intp]) -> "AudioIndex":
        """The given rows, in the given order."""
        return AudioIndex(
            self.root, self.files, self.num_samples[rows], self.ids[rows], self.tags[rows], self.tag_names,
            self.tag_sources,
        )  # fmt: skip


def _index_path(source: Source, cache_dir: str) -> Path:
    """Where the index of a source is kept."""
    name = hashlib.sha256(source.identity.encode(errors="surrogateescape")).hexdigest()[:32]
    return Path(cache_dir) / f"{name}.arrow"


def find_index(request: Request, cache_dir: str) -> tuple[AudioIndex, list[Skipped]] | None:
    """What ``build_index`` gives, if nothing has to be built for it. Raises `DataError` as that does."""
    source = open_source(request)
    file = _open_current(_index_path(source, cache_dir), _fingerprint(source))
    return None if file is None else _as_index(file, source, request.flag)


def built_since(request: Request, cache_dir: str, moment: float) -> bool:
    """Whether the index of a source was written after ``moment`` (seconds since the epoch)."""
    path = _index_path(open_source(request), cache_dir)
    return path.exists() and path.stat().st_mtime > moment


def build_index(
    request: Request | str,
    cache_dir: str,
    progress: bool,
    rebuild: bool = False,
    num_processes: int | None = None,
) -> tuple[AudioIndex, list[Skipped]]:
    """List the utterances of one source with their lengths, from the cache where its files have not changed.

    The cache is ``cache_dir/<hash of the source's name>.arrow``. It is used again while the path, size and modification
    time of every file that the source depends on are as they were. Otherwise the headers of files that are new or have
    changed are read. It appears complete or not at all.

    Args:
        request: the source, see ``open_source``; a string for one without more to say.
        cache_dir: created if missing.
        progress: show a progress bar on standard error while headers are read, and say why they are.
        rebuild: read all headers again even where no file has changed.
        num_processes: processes that read headers; None for one per core.

    Returns:
        The index, in the source's order, and the files whose header could not be used.

    Raises:
        DataError: no such source, no audio in it, or none that can be read.
    """
    request = Request(request) if isinstance(request, str) else request
    source = open_source(request)
    path, fingerprint = _index_path(source, cache_dir), _fingerprint(source)
    file = None if rebuild else _open_current(path, fingerprint)
    if file is None:
        changed = path.exists() and not rebuild
        if progress:
            print(f"building the index of {source.name}", file=sys.stderr)
        listing = source.read()
        headers, num_known = read_headers(
            listing, source.root, path, progress=progress, num_processes=num_processes, rebuild=rebuild
        )
        if progress and changed:
            text = f"{source.name} has changed: index built again, {len(headers) - num_known:,} of {len(headers):,} "
            print(f"{text}headers read", file=sys.stderr)
        _write(path, source, listing, headers, fingerprint)
        file = IndexFile(str(path))
    return _as_index(file, source, request.flag)


def concatenate(indexes: Sequence[AudioIndex]) -> AudioIndex:
    """The utterances of several sources, one source after the other. Tags of several sources stay apart."""
    if len(indexes) == 1:
        return indexes[0]
    first_ids = np.cumsum([0, *(sum(len(file.usable) for file in index.files) for index in indexes)])
    first_tags = np.cumsum([0, *(len(index.tag_names) for index in indexes)])
    return AudioIndex(
        root=", ".join(index.root for index in indexes),
        files=tuple(file for index in indexes for file in index.files),
        num_samples=np.concatenate([index.num_samples for index in indexes]),
        ids=np.concatenate([index.ids + first for index, first in zip(indexes, first_ids, strict=False)]),
        tags=np.concatenate(
            [(index.tags + first).astype(np.int16) for index, first in zip(indexes, first_tags, strict=False)]
        ),
        tag_names=_joined_names(indexes),
        tag_sources=[number for number, index in enumerate(indexes) for _ in index.tag_names],
    )


def _joined_names(indexes: Sequence[AudioIndex]) -> list[str]:
    """`source/language`, or the source's label alone where it has no languages; no name twice."""
    names: list[str] = []
    for index in indexes:
        (file,) = index.files
        label = str(file.header["label"])
        for tag in index.tag_names:
            name = label if tag == label else f"{label}/{tag}"
            repeats = sum(other == name or other.startswith(f"{name} (") for other in names)
            names.append(f"{name} ({repeats + 1})" if repeats else name)
    return names


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


def _fingerprint(source: Source) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for path, size, mtime_ns in source.stamps:
        digest.update(os.fsencode(path) + f"\0{size} {mtime_ns}\0".encode())
    return digest.hexdigest()


def _open_current(path: Path, fingerprint: str) -> IndexFile | None:
    """The cached index, or None where there is none, it is damaged, or the source has changed."""
    try:
        file = IndexFile(str(path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return file if file.header.get("fingerprint") == fingerprint else None


def _write(path: Path, source: Source, listing: Listing, headers: list[Header], fingerprint: str) -> None:
    rows = listing.rows
    languages = sorted({row.language for row in rows if row.language is not None})
    if len(languages) > _MAX_LANGUAGES:
        raise DataError(
            f"{source.name} has {len(languages):,} languages, the first being {languages[0]!r}; at most "
            f"{_MAX_LANGUAGES:,} can be told apart; name another column of languages."
        )
    number = {language: position for position, language in enumerate(languages)}
    columns = {
        "name": pa.array([row.name for row in rows], pa.large_string()),
        "container": pa.array([row.container for row in rows], pa.int32()),
        "offset": pa.array([row.offset for row in rows], pa.int64()),
        "length": pa.array([row.length for row in rows], pa.int64()),
        "mtime_ns": pa.array([row.mtime_ns for row in rows], pa.int64()),
        "num_samples": pa.array([header.num_samples for header in headers], pa.int64()),
        "language": pa.array([-1 if row.language is None else number[row.language] for row in rows], pa.int16()),
        "reason": pa.array([header.reason for header in headers], pa.string()),
    }
    header = {
        "fingerprint": fingerprint,
        "root": source.root,
        "label": source.label,
        "containers": listing.containers,
        "languages": languages,
    }
    write_index(path, columns, header)
    forget_journals(path)


def _as_index(file: IndexFile, source: Source, flag: str) -> tuple[AudioIndex, list[Skipped]]:
    skipped = [Skipped(file.shown(row), reason) for row, reason in file.reasons()]
    if len(file) == 0:
        raise DataError(f"{flag} ({source.name}) must hold audio; there is none in it, so check what it should hold.")
    if len(file.usable) == 0:
        first = f" First: {skipped[0].path} ({skipped[0].reason})." if skipped else ""
        raise DataError(
            f"{flag} ({source.name}) must hold audio files that can be read; all {len(file)} found cannot.{first}"
        )
    languages: list[str] = file.header["languages"]
    tags = file.languages[file.usable]
    names = list(languages)
    if (tags < 0).any():  # the rest goes by the source's own name
        tags = np.where(tags < 0, len(names), tags).astype(np.int16)
        names.append(source.label)
    index = AudioIndex(
        root=source.root if source.identity.startswith("folder ") else source.name,
        files=(file,),
        num_samples=file.num_samples[file.usable],
        ids=np.arange(len(file.usable)),
        tags=tags,
        tag_names=names,
        tag_sources=[0] * len(names),
    )
    return index, skipped
