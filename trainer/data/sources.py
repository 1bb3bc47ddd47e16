"""Where utterances come from. Each source is a function that lists them in a fixed order."""

import os
from pathlib import PurePath

_COMPRESSED = {".flac", ".mp3", ".oga", ".ogg", ".opus"}
_PCM = {".aif", ".aifc", ".aiff", ".au", ".caf", ".nist", ".rf64", ".snd", ".sph", ".voc", ".w64", ".wav", ".wave"}
AUDIO_SUFFIXES = frozenset(_COMPRESSED | _PCM)
"""File name endings taken for audio (any case): the formats with a header that libsndfile 1.2 reads."""


def find_audio_files(folder: str) -> list[str]:
    """Audio files under ``folder`` at any depth, told by their suffix.

    Follows links to folders, visiting each folder once; leaves out hidden files and hidden folders.

    Returns:
        Paths relative to ``folder`` with forward slashes, sorted by code point.
    """
    found = []
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()  # a link back to a folder already walked
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # fixes which of two links wins
        relative = PurePath(os.path.relpath(parent, folder))
        found += [(relative / name).as_posix() for name in files if _is_audio(name)]
    return sorted(found)


def _is_audio(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES
