"""fairseq's manifests: a root folder, then a line for each utterance."""

import os
import re

from trainer.data.rows import DataError, Listing, Request, Row, Source, Stamp, checked_row

_IN_ZIP = re.compile(r"([^\0]+\.zip):(\d{1,18}):(\d{1,18})")  # numbers that fit 64 bits


def manifest_source(request: Request) -> Source:
    """A fairseq TSV manifest: the root folder in line 1, then ``path<TAB>num_samples`` and, if you like, a language.

    A path ``archive.zip:offset:length`` is a byte range of an uncompressed zip, as in fairseq's speech-to-text data.
    ``num_samples`` is not used: it counts at the file's own rate, so lengths come from the headers. The audio is taken
    to be unchanged as long as the manifest is.

    Raises:
        DataError: the file cannot be read, has no root folder or no utterance.
    """
    path = os.path.abspath(request.name)
    where = f"{request.flag} ({request.name})"
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            first = file.readline().rstrip("\r\n")
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}.") from error
    # Part of the identity below: with another root, or a relative one from elsewhere, the same names are other files.
    root = os.path.abspath(first)
    if not first or not os.path.isdir(root):
        raise DataError(f"{where} must name an existing folder in its first line, not {first!r}; correct that line.")
    stamp = Stamp(path, status.st_size, status.st_mtime_ns)
    label = os.path.splitext(os.path.basename(path))[0]
    return Source(request.name, label, root, f"manifest {path} of {root}", [stamp], lambda: _read(path, where))


def _read(path: str, where: str) -> Listing:
    rows = []
    containers: dict[str, int] = {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        next(file)
        for number, line in enumerate(file, start=2):
            if not line.strip():
                continue
            name, *rest = line.rstrip("\r\n").split("\t")
            if not name or len(rest) not in (1, 2) or not rest[0].strip().isdigit():
                raise DataError(
                    f"{where} must hold path, number of samples and perhaps a language in each line, separated by "
                    f"tabs; line {number} is {line.rstrip()[:100]!r}."
                )
            language = (rest[1].strip() or None) if len(rest) == 2 else None
            row = Row(name, language=language)
            if match := _IN_ZIP.fullmatch(name):
                container = containers.setdefault(match[1], len(containers))
                row = Row(f"{match[2]}:{match[3]}", container, int(match[2]), int(match[3]), language=language)
            rows.append(checked_row(row))
    if not rows:
        raise DataError(f"{where} must list utterances after its first line; it lists none.")
    return Listing(rows, list(containers))
