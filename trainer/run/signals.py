"""A request to stop, made from outside: the current update is finished, a checkpoint saved, the exit code is 4.

SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) ask for it. A second signal ends the process at once, without a checkpoint.
"""

import os
import signal
import threading
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


# Schedulers signal launcher and ranks, and the launcher passes its signal on: what comes this soon is the same request.
ECHO_SECONDS = 10.0
# A terminal sends Ctrl-C to launcher and ranks, and some launchers, such as coreutils' timeout, pass theirs on at once.
# No hand is that fast.
_FORWARDED_SECONDS = 0.1


class StopRequest:
    """Whether a signal to stop has arrived; one that follows later than `echo_seconds` ends the process at once."""

    def __init__(self, echo_seconds: float = ECHO_SECONDS) -> None:
        self.requested = False
        self.echo_seconds = echo_seconds
        self._first_time = 0.0
        self._first_number = 0

    def install(self) -> None:
        """Take the signals over; call from the main thread.

        Python runs handlers in the main thread, and not while that waits for other ranks inside a collective. What
        arrives is therefore read from a pipe, by a thread that is never busy.
        """
        arrivals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._read, args=(arrivals,), name="signals", daemon=True).start()

    def _read(self, arrivals: int) -> None:
        while True:
            for number in os.read(arrivals, 16):
                if number in STOP_SIGNALS:  # of others too there may be a handler
                    self._take(number)

    def _take(self, number: int) -> None:
        if not self.requested:
            self.requested = True
            self._first_time = time.monotonic()
            self._first_number = number
            os.write(2, b"\nstopping after this update and saving; Ctrl-C (again) stops at once\n")
        elif self._since_first() >= self._echo_seconds(number):
            os._exit(128 + number)

    def _echo_seconds(self, number: int) -> float:
        """How long after the first signal this one may be its echo; a second Ctrl-C is pressed on purpose."""
        return _FORWARDED_SECONDS if number == self._first_number == signal.SIGINT else self.echo_seconds

    def _since_first(self) -> float:
        return time.monotonic() - self._first_time
