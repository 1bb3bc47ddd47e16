"""Compilers, and DeepSpeed's extensions that runs with offload compile when they first start."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.doctor.findings import Finding, note
from trainer.run.extensions import OPS, extensions_folder

_ONLY_FOR_OFFLOAD = "only configurations with offload need it"
_BUILD_LIMIT_SECONDS = 900
_HEADERS = (Path("/usr/include"), Path("/usr/local/include"))


def compilers() -> Iterator[Finding]:
    """A C++ compiler, ninja and, for a CUDA build of torch, nvcc of the same CUDA. Runs without offload need none."""
    import torch

    for program, package in (("c++", "g++"), ("ninja", "ninja-build")):
        path = shutil.which(program)
        if path is None:
            yield note(program, "not found", f"{_ONLY_FOR_OFFLOAD} (Debian package: {package})")
        else:
            yield Finding(program, f"{path}, {_first_line(path, '--version')}")
    if torch.version.cuda is None:
        return
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        yield note("nvcc", "not found", f"{_ONLY_FOR_OFFLOAD}; install the CUDA toolkit {torch.version.cuda}")
        return
    release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    found = release[1] if release else "of an unknown version"
    if found.split(".")[0] != torch.version.cuda.split(".")[0]:
        yield note(
            "nvcc", f"{nvcc}, CUDA {found}, but torch is built for {torch.version.cuda}",
            f"DeepSpeed refuses to compile; {_ONLY_FOR_OFFLOAD}. Put that toolkit first in PATH and in CUDA_HOME",
        )  # fmt: skip
    else:
        yield Finding("nvcc", f"{nvcc}, CUDA {found}")


def ops() -> Iterator[Finding]:
    """Each extension: compiled, to be compiled, or not to be compiled here."""
    for name, op in OPS.items():
        folder = Path(extensions_folder(os.environ)) / name
        lock = folder / "lock"
        if lock.exists():
            yield note(
                name, f"{lock}: it is being compiled or loaded, or a process that did so was killed",
                f"rm {lock} where no run is starting: the next one waits for it",
            )  # fmt: skip
        elif (folder / f"{name}.so").exists():
            yield Finding(name, f"compiled ({op.needed_for}), in {folder}")
        elif op.header and not any((place / op.header).exists() for place in _HEADERS):
            yield note(
                name, f"cannot be compiled: no {op.header}", f"Debian package {op.package}; {op.needed_for} only"
            )
        else:
            yield note(
                name, f"not compiled yet ({op.needed_for})",
                "the first such run takes a minute or two for it; `trainer doctor --build_ops` does it now",
            )  # fmt: skip


def build_ops() -> Iterator[Finding]:
    """Compile what can be, each in a process of its own, then say how things stand."""
    for name, op in OPS.items():
        if op.header and not any((place / op.header).exists() for place in _HEADERS):
            continue
        start = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "trainer.run.extensions", name],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, _import_paths()))},
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_BUILD_LIMIT_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield Finding(name, f"not compiled after {_BUILD_LIMIT_SECONDS} s", "look for a busy disk or a stale lock")
            continue
        if done.returncode == 0:
            yield Finding(name, f"compiled or loaded in {time.monotonic() - start:.0f} s")
        else:
            told = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["it did not say why"]
            by_hand = f"python -m trainer.run.extensions {name}"
            yield Finding(name, f"not compiled: {told[0].strip()}", f"see all it says: {by_hand}")
    yield from ops()


def _import_paths() -> list[str]:
    return [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]


def _first_line(*command: str) -> str:
    return (_output(*command).splitlines() or ["of an unknown version"])[0]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
