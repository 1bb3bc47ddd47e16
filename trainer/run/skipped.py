"""Files that cannot be used: listed in `skipped.tsv`, counted by reason, and too many of them end the run."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from trainer.data.rows import SILENT_IN_PART, Skipped
from trainer.errors import RunWentBad
from trainer.layout import SKIPPED_FILE


def write_skipped(folder: Path, skipped: Iterable[Skipped]) -> Path:
    """Write a new list into `folder`, complete or not at all; returns its path. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{SKIPPED_FILE}.{os.getpid()}.tmp"
    temporary.write_text("".join(f"{_shown(item.path)}\t{item.reason}\n" for item in skipped), encoding="utf-8")
    os.replace(temporary, folder / SKIPPED_FILE)
    return folder / SKIPPED_FILE


def count_reasons(skipped: Iterable[Skipped]) -> str:
    """`unreadable: 2, empty: 1`."""
    return ", ".join(f"{reason}: {count:,}" for reason, count in Counter(item.reason for item in skipped).items())


def _shown(path: str) -> str:
    return path.encode("unicode_escape").decode("ascii")  # a name may hold a tab or a newline


class SkippedLog:
    """`skipped.tsv`: each file that was left out, once, with the reason; ranks append to the same file.

    `failure` keeps the first `OSError` for a moment when all ranks can learn of it: one rank alone meets a broken file.
    """

    def __init__(self, path: Path, most: int) -> None:
        """More than `most` different files since this start are too many, see `share`."""
        self.path = path
        self.most = most
        self.failure: OSError | None = None
        self.seen: set[str] = set()
        self.num_bytes_read = 0
        self.met: set[str] = set()
        self.unshared: list[str] = []
        self._catch_up()

    def _catch_up(self) -> None:
        """Read what was listed since the last time: the whole list for each file would take minutes for 50,000."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.num_bytes_read)
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()  # another rank is at it
            self.num_bytes_read += sum(map(len, lines))
            self.seen.update(line.decode(errors="replace").split("\t")[0] for line in lines)

    def add(self, items: Iterable[Skipped]) -> None:
        """List the files that are not listed yet."""
        for item in items:
            name = _shown(item.path)
            if name not in self.met and item.reason != SILENT_IN_PART:  # of such a file other crops are used
                self.met.add(name)
                self.unshared.append(name)
            if name in self.seen:
                continue
            try:
                self._append(name, item.reason)
            except OSError as error:
                self.failure = self.failure or error
            self.seen.add(name)

    def _append(self, name: str, reason: str) -> None:
        self._catch_up()  # another rank may have met the file
        if name not in self.seen:
            print(f"skipped {name}: {reason}", file=sys.stderr)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{name}\t{reason}\n")

    def take_unshared(self) -> list[str]:
        """Files that this rank met since it was last asked. Raises the `OSError` of one that could not be listed."""
        if self.failure is not None:
            raise self.failure
        taken, self.unshared = self.unshared, []
        return taken

    def share(self, met: Iterable[list[str]]) -> None:
        """Take over what all ranks met. Raises `RunWentBad`, on all of them, when that is too much."""
        self.met.update(*met)
        if len(self.met) > self.most:
            raise RunWentBad(
                f"{len(self.met):,} files could not be used, more than max_skipped_fraction allows ({self.most:,}); "
                f"they are listed in {self.path}. Mend or remove them, or raise --max_skipped_fraction, then go on "
                "with --resume latest."
            )
