"""Ranks of the real program without a launcher: processes that a test can kill one by one.

They are forked from a server that has imported torch and DeepSpeed already, which saves most of a start.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_LIBRARIES = ["deepspeed", "deepspeed.ops.adam", "trainer.run.build", "trainer.doctor.command"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_LIBRARIES)


def start_ranks(arguments: list[str], log: Path, number: int = 2) -> list[ForkServerProcess]:
    """Start `trainer ARGUMENTS` on `number` CPU ranks that write to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log.write_bytes(b"")
    ranks = []
    for rank in range(number):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        process = _CONTEXT.Process(target=_be_a_rank, args=(environment, arguments, str(log)))
        process.start()
        ranks.append(process)
    return ranks


def warm_up(log: Path) -> None:
    """Have the server start and import, for whoever measures the time of what follows."""
    wait(start_ranks(["pretrain", "--help"], log, number=1), 120)


def _be_a_rank(environment: dict[str, str], arguments: list[str], log: str) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    from trainer.cli import main

    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def kill(ranks: list[ForkServerProcess]) -> None:
    """SIGKILL to those that still run; returns when they are gone."""
    for process in ranks:
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    for process in ranks:
        process.join()


def wait(ranks: list[ForkServerProcess], seconds: float) -> list[int | None]:
    """Exit codes once all have ended (None: not within `seconds`)."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0.0))
    return [process.exitcode for process in ranks]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl` without what depends on the clock and the memory."""
    clock = ("audio_seconds_per_second", "peak_memory_bytes")
    path = run / "metrics.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # being written
            lines.append({name: value for name, value in json.loads(text).items() if name not in clock})
    return lines
