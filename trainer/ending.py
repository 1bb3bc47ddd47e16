"""How a process ends."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End the process with this exit code as usual, except that what C++ libraries hold is not taken apart.

    Threads of gloo that outlive Python's last objects abort the process (torch 2.13), with -6 in place of `code`.
    """
    if "torch" in sys.modules:
        atexit._run_exitfuncs()  # a tracker sends its last lines, worker processes end
        end_at_once(code)
    sys.exit(code)


def end_at_once(code: int) -> NoReturn:
    """End the process with this exit code and wait for nothing, as other ranks may wait for this one."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or its disk is full
            stream.flush()
    os._exit(code)
