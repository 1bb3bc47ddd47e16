"""Where utterances come from: what kind of source a name stands for, and the folder of audio files.

The other kinds are in sources_manifest.py, sources_tar.py and sources_hub.py. Each lists its rows in a fixed order.
"""

import glob
import os
import re
from pathlib import Path

from trainer.data.rows import DataError, Listing, Request, Row, Source, Stamp, checked_row
from trainer.data.sources_hub import hub_source, is_saved_dataset, parquet_source, saved_source
from trainer.data.sources_manifest import manifest_source
from trainer.data.sources_tar import tar_source

_COMPRESSED = {".flac", ".mp3", ".oga", ".ogg", ".opus"}
_PCM = {".aif", ".aifc", ".aiff", ".au", ".caf", ".nist", ".rf64", ".snd", ".sph", ".voc", ".w64", ".wav", ".wave"}
AUDIO_SUFFIXES = frozenset(_COMPRESSED | _PCM)
"""File name endings taken for audio (any case): the formats with a header that libsndfile 1.2 reads."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_source(request: Request) -> Source:
    """Find out what ``request.name`` is and look at the files it depends on; no audio is opened.

    A folder of audio files; a fairseq manifest (``.tsv``); tar shards (``.tar``, a pattern or a folder of them); a data
    set saved with ``save_to_disk``; Parquet files (one, a pattern or a folder of them); anything that
    ``datasets.load_dataset`` takes: a Hub id, or a folder together with a configuration or a split. A folder of audio
    with a subfolder for each split (audiofolder) is one of audio, whether a split is named or not.

    Raises:
        DataError: nothing there that could be one of these.
    """
    name = request.name
    if os.path.isdir(name):
        return _open_folder(request)
    files = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    if files and all(os.path.isfile(file) for file in files):
        if suffixes == {".tsv"}:
            _refuse_parts(request, "a manifest")
            if len(files) > 1:
                raise DataError(f"{request.flag} ({name}) must be one manifest, not {len(files)}; name each of them.")
            return manifest_source(request._replace(name=files[0]))
        if suffixes == {".tar"}:
            _refuse_parts(request, "tar shards")
            return tar_source(request, files, is_audio)
        if suffixes == {".parquet"}:
            _refuse_parts(request, "a Parquet file")
            return parquet_source(request, files)
        if name.lower().endswith(_COMPRESSED_TARS):
            raise DataError(
                f"{request.flag} ({name}) must be an uncompressed tar file, whose members can be read from where they "
                "lie; unpack the compression (gunzip, xz -d, ...)."
            )
        raise DataError(
            f"{request.flag} ({name}) must be a folder of audio, a .tsv manifest, .tar shards, Parquet files or a "
            "saved data set; this file is none of them."
        )
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return hub_source(request)
    raise DataError(
        f"{request.flag} ({name}) must be an existing folder of audio files, a .tsv manifest, .tar shards, Parquet "
        "files, a saved data set or a Hub id; check the path."
    )


def _open_folder(request: Request) -> Source:
    if is_saved_dataset(request.name):
        return saved_source(request)
    if request.config is None and request.split and os.path.isdir(os.path.join(request.name, request.split)):
        # The layout of audiofolder. `datasets` 5.2 cannot read it without torchcodec.
        split = folder_source(request._replace(name=os.path.join(request.name, request.split)))
        if split.stamps:
            return split
    if request.config is not None or request.split is not None:
        return hub_source(request)
    source = folder_source(request)
    if source.stamps:
        return source
    inside = Path(request.name)
    if tars := sorted(map(str, inside.glob("*.tar"))):
        return tar_source(request, tars, is_audio)
    if parquet := sorted(map(str, inside.rglob("*.parquet"))):
        return parquet_source(request, parquet)
    raise DataError(
        f"{request.flag} ({request.name}) must hold audio files (wav, flac, ogg, mp3, ...), .tar shards or Parquet "
        "files; none was found."
    )


def _refuse_parts(request: Request, what: str) -> None:
    for part, value in (("config", request.config), ("split", request.split)):
        if value is not None:
            raise DataError(
                f"dataset_{part}_names ({value}) is for data sets that have them; {request.name} is {what}; leave "
                f"--dataset_{part}_names out."
            )


def folder_source(request: Request) -> Source:
    """Audio files at any depth, told by their suffix, see ``find_audio_files``."""
    root = os.path.abspath(request.name)
    stamps = find_audio_files(root)

    def read() -> Listing:
        return Listing([_file_row(stamp) for stamp in stamps])

    return Source(request.name, os.path.basename(root), root, f"folder {root}", stamps, read)


def _file_row(stamp: Stamp) -> Row:
    reason = "folder cannot be read" if stamp.path.endswith("/") else None
    return checked_row(Row(stamp.path, length=stamp.size, mtime_ns=stamp.mtime_ns, reason=reason))


def find_audio_files(folder: str) -> list[Stamp]:
    """Audio files under ``folder`` at any depth, told by their suffix.

    Follows links to folders, visiting each folder once; leaves out hidden files and hidden folders.

    Returns:
        Paths relative to ``folder`` with forward slashes, sorted by code point. A folder that cannot be read is among
        them, with a slash at its end.
    """
    found: list[Stamp] = []
    visited: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        inside = waiting.pop()  # relative, with a slash at its end
        try:
            status = os.stat(os.path.join(folder, inside))
            if (status.st_dev, status.st_ino) in visited:
                continue  # a link back to a folder already walked
            visited.add((status.st_dev, status.st_ino))
            folders = _scan(os.path.join(folder, inside), inside, found)
        except OSError:
            found.append(Stamp(inside or "./", 0, 0))
            continue
        waiting += sorted(folders, reverse=True)  # fixes which of two links wins
    return sorted(found)


def _scan(path: str, inside: str, found: list[Stamp]) -> list[str]:
    """Append the audio files of one folder; returns its subfolders."""
    folders = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    folders.append(f"{inside}{name}/")
                elif _has_audio_suffix(name):
                    status = entry.stat()
                    found.append(Stamp(inside + name, status.st_size, status.st_mtime_ns))
            except OSError:  # a dangling link, or one in a circle; its header fails too and says so
                if _has_audio_suffix(name):
                    found.append(Stamp(inside + name, 0, 0))
    return folders


def is_audio(name: str) -> bool:
    """Whether a path is that of audio and not hidden."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and _has_audio_suffix(base)


def _has_audio_suffix(name: str) -> bool:
    stem, dot, suffix = name.rpartition(".")
    return bool(stem and dot) and f".{suffix.lower()}" in AUDIO_SUFFIXES
