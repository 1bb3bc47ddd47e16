"""Ends a rank that waits for one that is dead or hung: no exit code is worse than a wait without end.

The process group's own timeout (30 minutes or `--hang_timeout_seconds`, if that is longer) is for starts and saves. For
updates it would have to be short, and torch changes that of a living group only through a private call, group by group,
DeepSpeed's included. So each rank watches its own progress in a thread, whatever it waits for, be it a collective or a
file system. Ranks wait for each other in every update: one that hangs stops all, and all end.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from trainer.run.engine import COLLECTIVE_TIMEOUT

_Item = TypeVar("_Item")

_PATIENCE_SECONDS = COLLECTIVE_TIMEOUT.total_seconds()
_TICK_SECONDS = 1.0


def patience_seconds(hang_timeout_seconds: float) -> float:
    """For what takes long once: the start, the first update, a save, the end; and for any one collective.

    Never less than `--hang_timeout_seconds`, which is what a rank that gave up advises to raise.
    """
    return max(_PATIENCE_SECONDS, hang_timeout_seconds)


class _Task(NamedTuple):
    doing: str
    seconds: float


class Watchdog:
    """Ends the process with code 1 when a task it was told of takes longer than it may."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._task: _Task | None = None

    def start(self) -> None:
        """Watch from now on, until the process ends."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def expect(self, doing: str, seconds: float) -> None:
        """The rank has made progress; `doing`, which it begins now, may take this long."""
        self._task = _Task(doing, seconds)  # a new object each time, by which `_watch` sees progress

    def expect_each(self, doing: str, items: Iterable[_Item], seconds: float) -> Iterator[_Item]:
        """The items; getting one and what is done with it may take this long."""
        self.expect(doing, seconds)
        for item in items:
            self.expect(doing, seconds)
            yield item

    def _watch(self) -> None:
        watched, waited, before = self._task, 0.0, time.monotonic()
        while True:
            time.sleep(_TICK_SECONDS)
            now = time.monotonic()
            # a job that was suspended as a whole goes on: only time in which this process ran counts
            waited, before = waited + min(now - before, 2 * _TICK_SECONDS), now
            if self._task is not watched:
                watched, waited = self._task, 0.0
            elif watched is not None and waited >= watched.seconds:
                self._end(watched)

    def _end(self, task: _Task) -> None:
        print(
            f"trainer: error on rank {self.rank}: {task.doing} took longer than {task.seconds:g} s: another rank is "
            "dead or hung, or a disk or the network does not answer. Another rank's log, or below where this one "
            "stands, shows which. Where nothing hangs, raise --hang_timeout_seconds. Go on with --resume latest.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)
