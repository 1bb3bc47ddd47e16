"""SLURM, and what shapes the way ranks find each other: interfaces, InfiniBand, NCCL's variables, limits."""

import os
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainer.doctor.findings import Finding, note

_SLOWER = {"NCCL_P2P_DISABLE": "NVLink", "NCCL_IB_DISABLE": "InfiniBand", "NCCL_SHM_DISABLE": "shared memory"}
_FEWEST_FILES = 4096


def slurm() -> Iterator[Finding]:
    """Whether this is a job, and whether it has one task per GPU."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        there = "not in a job" if shutil.which("sbatch") else "not on this machine"
        yield Finding("SLURM", there)
        return
    tasks = (os.environ.get("SLURM_TASKS_PER_NODE") or "1").split("(")[0]
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    told = f"job {job}: {os.environ.get('SLURM_JOB_NUM_NODES', '1')} node(s), {tasks} task(s) and {gpus} GPUs on each"
    if gpus not in ("0", tasks):
        yield note("SLURM", told, "a rank is a task and takes one GPU: --ntasks-per-node equal to --gpus-per-node")
    else:
        yield Finding("SLURM", told)


def network() -> Iterator[Finding]:
    """Interfaces, the variables that choose among them, InfiniBand, limits."""
    interfaces = [name for _, name in socket.if_nameindex()]
    yield _own_name()
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    yield Finding("network", f"interfaces {', '.join(interfaces)}; InfiniBand: {', '.join(devices) or 'none'}")
    yield from variables(os.environ, interfaces)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if devices and locked != resource.RLIM_INFINITY:
        yield note(
            "locked memory", f"limited to {locked // 1024} KiB",
            "InfiniBand needs more: ulimit -l unlimited, which an administrator allows (launch/cluster.sh asks)",
        )  # fmt: skip
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _FEWEST_FILES:
        yield note("open files", f"limited to {files}", f"batches on their way hold files open: ulimit -n {most_files}")


def variables(environ: Mapping[str, str], interfaces: Sequence[str]) -> Iterator[Finding]:
    """What is set for NCCL, gloo and threads; an interface that does not exist is wrong."""
    told = [f"{name}={environ[name]}" for name in sorted(environ) if name.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_"))]
    told += [f"OMP_NUM_THREADS={environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in environ else []
    yield Finding("variables", ", ".join(told) or "none of NCCL, gloo or OpenMP is set")
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if name in environ and not _names_one(environ[name], interfaces):
            yield Finding(
                name, f"{environ[name]} names none of {', '.join(interfaces)}", f"correct it, or unset {name}"
            )
    for name, what in _SLOWER.items():
        if environ.get(name) == "1":
            yield note(name, f"1: ranks do without {what}", f"unset {name} unless there is a reason")


def _names_one(value: str, interfaces: Sequence[str]) -> bool:
    """NCCL's notation: prefixes with commas; `=` before them asks for whole names, `^` for all others."""
    wanted = value.lstrip("^=").split(",")
    whole = "=" in value[:2]
    chosen = [name for name in interfaces if any(name == want if whole else name.startswith(want) for want in wanted)]
    return len(chosen) < len(interfaces) if value.startswith("^") else bool(chosen)


def _own_name() -> Finding:
    """Ranks tell each other the name of their machine."""
    name = socket.gethostname()
    try:
        return Finding("own name", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        return note("own name", f"{name} cannot be resolved", f"a line in /etc/hosts: 127.0.1.1 {name}")
