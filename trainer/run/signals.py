"""A request to stop, made from outside: the current update is finished, a checkpoint saved, the exit code is 4."""

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether SIGTERM or SIGUSR1 has arrived; a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Take the signals over; call from the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
