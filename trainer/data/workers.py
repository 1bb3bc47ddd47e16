"""How loader processes start, and what ends them.

A fork server starts them: forking a process that runs threads or CUDA is unsafe, and an interpreter that imports torch
for each of them is slow.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from types import TracebackType

_JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def start_fork_server(preload: str) -> None:
    """Start this process's fork server, if it has none; the workers it forks find the module ``preload`` imported."""
    with signals_blocked():
        resource_tracker.ensure_running()  # on its own: it leaves SIGINT and SIGTERM unblocked when it has to start
    with signals_blocked():
        forkserver.set_forkserver_preload([preload])
        forkserver.ensure_running()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started meanwhile keep the block for life; signals to this one arrive at the end.

    A terminal sends SIGINT, and a cluster SIGTERM or SIGUSR1, to every process of the job. They are meant for the
    trainer, which needs its workers until it has saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:
    """Tie a worker to its trainer; runs in the worker, before it loads anything."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)  # the fork server may have been started by someone else
    sys.excepthook = _report_unless_disconnected
    for watch in (_exit_with, _exit_when_terminated_by):
        threading.Thread(target=watch, args=(parent_process(),), daemon=True).start()


def _report_unless_disconnected(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """A trainer interrupted while it takes over a tensor hangs up; the thread that hands it out would print that."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def _exit_with(trainer: BaseProcess) -> None:
    """However the trainer ends, SIGKILL included."""
    connection.wait([trainer.sentinel])
    os._exit(1)


def _exit_when_terminated_by(trainer: BaseProcess) -> None:
    """SIGTERM counts only from the trainer: interpreter shutdown ends left-over workers with it and waits for them."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
        pass
    os._exit(0)
