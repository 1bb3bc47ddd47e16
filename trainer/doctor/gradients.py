"""Ranks of their own: do they reach each other, and does DeepSpeed get gradients right here?"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.doctor.findings import Finding

_CHECK_LIMIT_SECONDS = 300
NUM_RANKS = 2


def gradients() -> Iterator[Finding]:
    """An all-reduce, and one update of a probe under every ZeRO stage, in processes of their own."""
    import torch

    ranks = min(NUM_RANKS, torch.cuda.device_count()) if torch.cuda.is_available() else NUM_RANKS
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", "--module", "trainer.run.self_check",
    ]  # fmt: skip
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "SLURM_"))},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    subject = "gradients"
    by_hand = f"run it by hand to see more: {' '.join(command[1:])}"
    # in a session of its own; torchrun ends its ranks when it is asked to stop, and only then
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=_CHECK_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        yield Finding(
            subject, f"{ranks} rank(s): no answer in {_CHECK_LIMIT_SECONDS} s",
            f"most likely the ranks cannot reach each other (firewall, NCCL_SOCKET_IFNAME); {by_hand}",
        )  # fmt: skip
        return
    for line in stdout.splitlines():
        if line.startswith("ZeRO stage"):
            yield Finding(subject, f"{ranks} rank(s), {line}")
        elif line.startswith("all-reduce"):
            yield Finding("all-reduce", f"{ranks} rank(s), {line.removeprefix('all-reduce ')}")
    if process.returncode != 0:
        reason, remedy = _reason(stderr)
        yield Finding(subject, f"{ranks} rank(s): {reason}", remedy or by_hand)


def _reason(stderr: str) -> tuple[str, str]:
    """What went wrong in the ranks and, where it is known, the remedy; launchers write pages around it."""
    for line in stderr.splitlines():
        if "wrong by a factor" in line:
            return line, "pip install deepspeed at the version in constraints.txt"
    errors = re.findall(r"^(?:\[rank\d+\]: )?(\w[\w.]*(?:Error|Exception): .*)$", stderr, re.MULTILINE)
    return (errors[0] if errors else "it ended without saying why"), ""
