"""Optimizer state on an NVMe drive (ZeRO-3 only): what has to hold for it, and where a run's files go.

Nothing heavy is imported, so mistakes show before anything is loaded.
"""

import contextlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OPTIMIZER = "zero_optimization.offload_optimizer"
_BLOCK_BYTES = 4096  # direct I/O wants whole blocks


def uses_nvme(config: dict[str, Any]) -> bool:
    """Whether a DeepSpeed configuration puts the optimizer's state on NVMe."""
    return bool(_device(config, "offload_optimizer") == "nvme")


def nvme_problems(config: dict[str, Any], nvme_path: str | None, source: str) -> Iterator[str]:
    """Write `--nvme_path` into `config`, or say what stands against it; `source` names the file."""
    if _device(config, "offload_param") == "nvme":
        yield (
            'zero_optimization.offload_param.device ("nvme") must be "cpu" or "none": with parameters on NVMe '
            "DeepSpeed 0.19.8 does not start; offload the optimizer alone."
        )
    if not uses_nvme(config):
        if nvme_path is not None:
            yield (
                f"--nvme_path ({nvme_path}) is set, but {source} puts nothing on NVMe; leave it out or use "
                "--deepspeed zero3_nvme."
            )
        return
    offload = config["zero_optimization"]["offload_optimizer"]
    stage = config["zero_optimization"].get("stage")
    if stage != 3:
        yield f'{_OPTIMIZER}.device ("nvme") needs zero_optimization.stage 3, not {stage}; change one of them.'
    for key in ("pipeline_read", "pipeline_write"):
        if offload.get(key):
            yield f"{_OPTIMIZER}.{key} must be false: a checkpoint would be copied while files are written; remove it."
    found = offload.get("nvme_path", "auto")
    if nvme_path is None:
        remedy = "give a folder on a local NVMe drive" if found == "auto" else f"pass --nvme_path {found}"
        yield f'{_OPTIMIZER}.device is "nvme", but --nvme_path is not set; {remedy}.'
    elif found not in ("auto", nvme_path):
        yield (
            f'{_OPTIMIZER}.nvme_path is "{found}", but --nvme_path sets it to "{nvme_path}"; write "auto" in the file '
            f"or pass --nvme_path {found}."
        )
    elif problem := _folder_problem(Path(nvme_path)):
        yield f"--nvme_path ({nvme_path}) {problem}."
    offload["nvme_path"] = nvme_path


def own_folder(nvme_path: str, output_dir: str) -> Path:
    """A run's place in `nvme_path`: the same at every start, another for every run folder.

    DeepSpeed names its files by rank alone, so two runs in one folder would write each other's.
    """
    return Path(nvme_path) / f"trainer-{zlib.crc32(os.path.abspath(output_dir).encode()):08x}"


def remove_files(swap_folder: Path) -> None:
    """Remove what a rank wrote, and the folders of the run above it once no other rank's files are there."""
    shutil.rmtree(swap_folder, ignore_errors=True)
    for folder in list(swap_folder.parents)[:3]:  # "optimizer", "zero_stage_3" and the run's own
        with contextlib.suppress(OSError):
            folder.rmdir()


def _device(config: dict[str, Any], section: str) -> Any:
    zero = config.get("zero_optimization")
    offload = zero.get(section) if isinstance(zero, dict) else None
    return offload.get("device") if isinstance(offload, dict) else None


def _folder_problem(folder: Path) -> str | None:
    """What keeps DeepSpeed from writing there; it opens its files for direct I/O."""
    if not folder.is_dir():
        return "is not a folder; make it, or name another one"
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(bytes(_BLOCK_BYTES))
            probe.flush()
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        return (
            f"cannot be written as DeepSpeed writes it: {error.strerror}; name a folder on a local disk that you may "
            "write to and that takes direct I/O"
        )
    return None
