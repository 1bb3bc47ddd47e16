"""File systems: what lies under the run folder, under the folder of an NVMe offload, and under shared memory."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.doctor.findings import Finding, note

_OF_ONE_MACHINE = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs"}
_IN_MEMORY = {"tmpfs", "ramfs"}
# Of `large`: weights in bf16, and weights and two moments in fp32, for 317 million parameters.
_LARGE_CHECKPOINT_BYTES = 14 * 317_000_000
# `save_total_limit` of the recipes, and one while it is being written.
_NUM_CHECKPOINTS = 6
_SHARED_MEMORY_BYTES = 1 << 30


class Mount(NamedTuple):
    """A mounted file system."""

    folder: str
    kind: str


def mount_of(path: Path, mounts: str) -> Mount:
    """The file system that `path` lies on, according to the text of `/proc/mounts`."""
    found = Mount("/", "unknown")
    for line in mounts.splitlines():
        _, folder, kind, *_ = line.split()
        folder = folder.encode().decode("unicode_escape")  # a space is written as \040
        within = path == Path(folder) or Path(folder) in path.parents
        if within and len(folder) >= len(found.folder):
            found = Mount(folder, kind)
    return found


def output_folder(folder: Path) -> Iterator[Finding]:
    """Whether runs can be written, their locks work, and what is free."""
    mount, existing = _mount(folder), _existing(folder)
    free = os.statvfs(existing)
    free_bytes = free.f_bavail * free.f_frsize
    room = free_bytes // _LARGE_CHECKPOINT_BYTES
    told = f"{existing} is on {mount.kind}, {free_bytes / 1e9:.1f} GB free, room for {room} checkpoints of `large`"
    if problem := _cannot_write(existing):
        yield Finding("output_dir", f"{told}; {problem}", "choose another --output_dir")
        return
    num_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    if num_nodes > 1 and mount.kind in _OF_ONE_MACHINE:
        yield Finding(
            "output_dir", f"{told}; the job has {num_nodes} nodes",
            "each would keep a part of every checkpoint: choose a folder on a file system that they share",
        )  # fmt: skip
    elif mount.kind in _IN_MEMORY:
        yield note("output_dir", f"{told}; it is memory", "a restart of the machine clears it: choose another folder")
    elif mount.kind == "overlay":
        yield note("output_dir", f"{told}; it is a container's", "it goes with the container: mount a folder into it")
    elif room < _NUM_CHECKPOINTS:
        yield note("output_dir", told, f"the recipes keep up to {_NUM_CHECKPOINTS}: see --save_total_limit")
    else:
        yield Finding("output_dir", told)


def nvme_folder(folder: Path) -> Iterator[Finding]:
    """Whether a folder is worth offloading to: writable, local, solid state, past the page cache."""
    mount, existing = _mount(folder), _existing(folder)
    free = os.statvfs(existing)
    told = f"{existing} is on {mount.kind}, {free.f_bavail * free.f_frsize / 1e9:.1f} GB free"
    if problem := _cannot_write(existing) or _no_direct_writes(existing):
        yield Finding("nvme_path", f"{told}; {problem}", "choose a folder on a local solid-state disk")
    elif mount.kind not in _OF_ONE_MACHINE - _IN_MEMORY or _rotates(existing):
        slow = "it turns" if mount.kind in _OF_ONE_MACHINE else "it is not a disk of this machine"
        slow = "it is memory" if mount.kind in _IN_MEMORY else slow
        yield note("nvme_path", f"{told}; {slow}", "offload to `cpu` instead, or to a local solid-state disk")
    else:
        yield Finding("nvme_path", told)


def shared_memory() -> Iterator[Finding]:
    """Decoded batches come from the loader's processes through it; containers often have 64 MB."""
    try:
        told = os.statvfs("/dev/shm")
    except OSError:
        yield note("/dev/shm", "not there", "loader processes hand over batches through it; or --num_workers 0")
        return
    free = told.f_bavail * told.f_frsize
    if free < _SHARED_MEMORY_BYTES:
        yield note(
            "/dev/shm", f"{free / 1e6:.0f} MB free",
            "loader processes hand over batches through it: docker run --shm-size=8g, or --num_workers 0",
        )  # fmt: skip
    else:
        yield Finding("/dev/shm", f"{free / 1e9:.1f} GB free")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _mount(folder: Path) -> Mount:
    return mount_of(_existing(folder).resolve(), Path("/proc/mounts").read_text(encoding="utf-8", errors="replace"))


def _cannot_write(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def _no_direct_writes(folder: Path) -> str:
    """DeepSpeed opens its files with O_DIRECT."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        except OSError as error:
            return f"takes no direct writes (O_DIRECT): {error.strerror}"
    return ""


def _rotates(folder: Path) -> bool:
    """Whether the disk below is one that turns; unknown counts as no."""
    number = os.stat(folder).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for place in (device, device.parent):  # a partition's queue is that of its disk
        flag = place / "queue" / "rotational"
        if flag.exists():
            return flag.read_text().strip() == "1"
    return False
