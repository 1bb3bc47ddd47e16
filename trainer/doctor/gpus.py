"""GPUs: are there any, does this torch run on them, and how large are they."""

from collections.abc import Iterator
from pathlib import Path

from trainer.doctor.findings import Finding, note

_FIRST_WITH_BF16 = (8, 0)  # Ampere


def gpus() -> Iterator[Finding]:
    """CUDA devices and their memory; none is fine, for CPU ranks work too."""
    import torch

    if not torch.cuda.is_available():
        yield _why_none(torch.version.cuda)
        return
    built_for = torch.cuda.get_arch_list()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    for index, device in enumerate(devices):
        free, total = torch.cuda.mem_get_info(index)
        told = f"{device.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        capability = (device.major, device.minor)
        if not _runs_on(capability, built_for):
            yield Finding(
                f"GPU {index}", f"{told}; compute capability {device.major}.{device.minor}",
                f"this torch is built for {', '.join(built_for)}: install another build of it (pytorch.org)",
            )  # fmt: skip
        elif capability < _FIRST_WITH_BF16:
            yield note(f"GPU {index}", f"{told}; no bfloat16", "the shipped recipes need --bf16 false on it")
        elif free < total / 2:
            yield note(f"GPU {index}", told, "somebody else uses it: nvidia-smi shows who")
        else:
            yield Finding(f"GPU {index}", told)
    if len({device.name for device in devices}) > 1:
        yield note("GPUs", "of different kinds", "the slowest sets the pace; CUDA_VISIBLE_DEVICES chooses among them")


def _why_none(built_for_cuda: str | None) -> Finding:
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return Finding("GPUs", "none; runs will use the CPU")
    if built_for_cuda is None:
        return Finding(
            "GPUs", "there are some, and this torch is a CPU build", "install a CUDA build of torch (pytorch.org)"
        )
    return Finding(
        "GPUs", f"there are some, and torch, built for CUDA {built_for_cuda}, cannot use them",
        "see what nvidia-smi says: the driver may be too old for that CUDA, or CUDA_VISIBLE_DEVICES hides them",
    )  # fmt: skip


def _runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a build for these architectures (`sm_80`, `compute_90`) runs on a device.

    Binaries run on the same major version from their minor version on; `compute_` is compiled for any later device.
    """
    for name in built_for:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        major, minor = divmod(int(digits), 10)
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or (
            kind == "compute" and (major, minor) <= capability
        ):
            return True
    return False
