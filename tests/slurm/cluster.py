"""A real SLURM with two emulated nodes, for as long as a test needs it. It installs nothing."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_SCRIPT = Path(__file__).parent / "nodes.sh"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "nsenter", "setpriv", "ip")
# Name spaces of its own: mounts, processes and network. All end with the first process, which ends with the test.
_UNSHARE = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
_START_LIMIT_SECONDS = 60.0
_END_LIMIT_SECONDS = 10.0


def why_not() -> str | None:
    """What keeps SLURM from running here; None where it can."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian packages: slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "starting a SLURM cluster takes root"
    refused = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    return f"no name spaces of its own: {refused.stderr.strip()}" if refused.returncode != 0 else None


@dataclasses.dataclass
class Cluster:
    """Runs commands where the cluster is."""

    folder: Path
    first_process: int

    def run(self, *command: str | Path, cwd: Path, environment: Mapping[str, str]) -> str:
        """Output of one of SLURM's commands. Raises `CalledProcessError`."""
        inside = ["nsenter", f"--target={self.first_process}", "--mount", "--pid", "--net", "env", f"--chdir={cwd}"]
        return subprocess.run(
            [*inside, *command], env={**environment, "SLURM_CONF": str(self.folder / "slurm.conf")},
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip


def _processes_in(name_space: str) -> list[int]:
    """Processes of a process name space, given as what `/proc/N/ns/pid` links to."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(path / "ns" / "pid") == name_space:
                found.append(int(path.name))
    return found


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster whose two nodes are idle. Raises `AssertionError` where a process of it is left at the end."""
    log = folder / "nodes.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", *_UNSHARE, "bash", str(_SCRIPT)],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    name_space = None
    try:
        cluster = _when_idle(folder, process, log)
        name_space = os.readlink(f"/proc/{cluster.first_process}/ns/pid")
        yield cluster
    finally:
        process.kill()
        process.wait()
        deadline = time.monotonic() + _END_LIMIT_SECONDS
        while name_space is not None and (left := _processes_in(name_space)):  # the kernel takes its time
            assert time.monotonic() < deadline, f"left over: {left}"
            time.sleep(0.05)


def _when_idle(folder: Path, process: subprocess.Popen[bytes], log: Path) -> Cluster:
    deadline = time.monotonic() + _START_LIMIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children and (folder / "slurm.conf").exists():
            cluster = Cluster(folder, int(children[0]))
            with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
                states = cluster.run("sinfo", "--noheader", "--format=%T", "--Node", cwd=folder, environment=os.environ)
                if set(states.split()) == {"idle"}:
                    return cluster
    raise AssertionError(f"no cluster in {_START_LIMIT_SECONDS:.0f} s:\n{log.read_text(errors='replace')[-4000:]}")
