"""One utterance of a source: where its bytes are. What every kind of source gives, and what is wrong with the rest."""

from collections.abc import Callable
from typing import NamedTuple

from trainer.errors import UserError


class DataError(UserError):
    """The user's data cannot be trained on; the message names the setting, its value, the rule and the remedy."""


SILENT_IN_PART = "silent in part"
"""Reason for leaving out one crop of a file that holds sound elsewhere: long recordings have pauses of zeros."""


class Skipped(NamedTuple):
    """A file left out, and why in a few words."""

    path: str
    reason: str


class Row(NamedTuple):
    """One utterance before its header is read."""

    name: str
    """Path relative to the source's root, or absolute; within a container the name in it."""
    container: int = -1
    """Number of the file that holds the utterance among others; -1 where ``name`` is a file of its own."""
    offset: int = 0
    """First byte within the container."""
    length: int = -1
    """Bytes; -1 where nobody has looked yet."""
    mtime_ns: int = 0
    """Modification time of the file; 0 where nobody has looked."""
    language: str | None = None
    reason: str | None = None
    """Why the utterance cannot be used, where that is known without its header."""


class Stamp(NamedTuple):
    """A file on which the index depends: it is built again when any stamp changes."""

    path: str
    size: int
    mtime_ns: int


class Listing(NamedTuple):
    """The rows of a source in its fixed order, and the container files they refer to by number."""

    rows: list[Row]
    containers: list[str] = []  # noqa: RUF012 (never written to)


class Source(NamedTuple):
    """A place that utterances come from, opened but not read."""

    name: str
    """As the user gave it, for messages."""
    label: str
    """Short name for tables."""
    root: str
    """Folder that names of rows and containers are relative to."""
    identity: str
    """Tells sources apart, whatever is in them at the moment."""
    stamps: list[Stamp]
    read: Callable[[], Listing]


class Request(NamedTuple):
    """What the user asked for: one data set by the flags."""

    name: str
    config: str | None = None
    split: str | None = None
    audio_column: str = "audio"
    language_column: str | None = None
    cache_dir: str | None = None
    flag: str = "dataset_name"


def checked_row(row: Row) -> Row:
    """The row, or one that says that its name cannot be kept (the index holds UTF-8 only) or be that of a file."""
    if "\0" in row.name:
        return row._replace(reason="zero byte in file name")
    try:
        row.name.encode()
    except UnicodeEncodeError:
        shown = row.name.encode(errors="surrogateescape").decode(errors="replace")
        return row._replace(name=shown, reason="file name not UTF-8")
    return row
