"""`trainer doctor`: what is installed, and whether DeepSpeed gets gradients right here; a table with remedies."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from trainer.arguments import RaisingParser

_PACKAGE = "speech-pretrainer"
_CHECK_LIMIT_SECONDS = 300
_SET_UP = "bash launch/setup.sh"
_INCOMPLETE = f"{_SET_UP}, then . launch/env.sh"
NUM_RANKS = 2


class Finding(NamedTuple):
    """One line of the table."""

    subject: str
    found: str
    remedy: str = ""  # empty: all is well


def main(words: Sequence[str]) -> int:
    """Print the findings; returns 0 when all is well, otherwise 2. Raises `ArgumentsError`."""
    parser = RaisingParser(
        prog="trainer doctor", allow_abbrev=False,
        description="Check versions, GPUs, and on up to two ranks that DeepSpeed gets gradients right.",
        epilog="exit codes: 0 all is well, 2 something needs the remedy shown",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.parse_args(list(words))
    findings = []
    for finding in _all_findings():
        print(f"{'WRONG' if finding.remedy else 'ok':5}  {finding.subject:14} {finding.found}", flush=True)
        if finding.remedy:
            print(f"       {'':14} -> {finding.remedy}", flush=True)
        findings.append(finding)
    return 2 if any(finding.remedy for finding in findings) else 0


def _all_findings() -> Iterator[Finding]:
    """The rest needs what `versions` looks for."""
    found = list(versions())
    yield from found
    if not any(finding.remedy == _INCOMPLETE for finding in found):
        yield gpus()
        yield from gradients()


def versions() -> Iterator[Finding]:
    """Python and each package this one depends on, against the range it asks for."""
    yield Finding("python", sys.version.split()[0])
    try:
        import torch  # noqa: F401
        from packaging.requirements import Requirement
    except ModuleNotFoundError as missing:
        yield Finding(str(missing.name), "not installed for this Python", _INCOMPLETE)
        return
    try:
        asked_for = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield Finding(_PACKAGE, "not installed, so nothing says which versions it needs", _SET_UP)
        return
    for text in asked_for:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", _SET_UP)
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        asked = f" (asked for: {requirement.specifier})" if requirement.specifier else ""
        yield Finding(requirement.name, found + asked, "" if fits else _SET_UP)


def gpus() -> Finding:
    """CUDA devices and their memory; none is fine, for CPU ranks work too."""
    import torch

    if not torch.cuda.is_available():
        return Finding("GPUs", "none that torch can use; runs will use the CPU")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Finding("GPUs", ", ".join(f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in devices))


def gradients() -> Iterator[Finding]:
    """One window of a probe under every ZeRO stage, in processes of their own."""
    import torch

    ranks = min(NUM_RANKS, torch.cuda.device_count()) if torch.cuda.is_available() else NUM_RANKS
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", "--module", "trainer.run.self_check",
    ]  # fmt: skip
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
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
