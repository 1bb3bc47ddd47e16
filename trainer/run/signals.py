"""A request to stop, made from outside: the current update is finished, a checkpoint saved, the exit code is 4.

SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) ask for it. A second Ctrl-C ends the process without a checkpoint.
"""

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


# Schedulers signal launcher and ranks, and the launcher passes its signal on: what comes this soon is the same request.
ECHO_SECONDS = 10.0


class StopRequest:
    """Whether a signal to stop has arrived; one that follows later than `echo_seconds` ends the process at once."""

    def __init__(self, echo_seconds: float = ECHO_SECONDS) -> None:
        self.requested = False
        self.echo_seconds = echo_seconds
        self._first_time = 0.0
        self._first_number = 0

    def install(self) -> None:
        """Take the signals over; call from the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self._first_time = time.monotonic()
            self._first_number = number
            os.write(2, b"\nstopping after this update and saving; Ctrl-C (again) stops at once\n")
        elif number == signal.SIGINT and self._first_number == signal.SIGINT:
            raise KeyboardInterrupt
        elif time.monotonic() - self._first_time >= self.echo_seconds:
            os._exit(128 + number)
