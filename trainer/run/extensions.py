"""Where DeepSpeed's compiled C++ extensions go: one folder per Python, torch and DeepSpeed version.

Two DeepSpeed versions that share torch's default folder load each other's binaries and fail with missing attributes.
`python -m trainer.run.extensions` prints the folder, for `launch/env.sh`; with names it compiles these into it.
"""

import contextlib
import os
import sys
import time
from collections.abc import MutableMapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

_STALE_LOCK_SECONDS = 1800  # compiling takes a minute or two


class Op(NamedTuple):
    """An extension that runs compile when they first need it."""

    builder: str
    needed_for: str
    header: str = ""  # of a library that it needs
    package: str = ""  # Debian's, which brings it


OPS = {
    "cpu_adam": Op("CPUAdamBuilder", "offload to the CPU or NVMe"),
    "async_io": Op("AsyncIOBuilder", "offload to NVMe", "libaio.h", "libaio-dev"),
}


def extensions_folder(environ: MutableMapping[str, str]) -> str:
    """The user's own TORCH_EXTENSIONS_DIR where it is set, otherwise a folder keyed by versions in the user's cache.

    Raises:
        importlib.metadata.PackageNotFoundError: torch or DeepSpeed is not installed.
    """
    if chosen := environ.get("TORCH_EXTENSIONS_DIR"):
        return chosen
    cache = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    key = f"{sys.implementation.cache_tag}-torch-{version('torch')}-deepspeed-{version('deepspeed')}"
    return str(Path(cache) / "speech-pretrainer" / "torch_extensions" / key)


def use_extensions_folder(environ: MutableMapping[str, str]) -> None:
    """Point torch at the folder; call it before DeepSpeed compiles or loads anything.

    torch takes a lock to compile and to load. One that a killed process left keeps every later one waiting without end.
    """
    folder = environ["TORCH_EXTENSIONS_DIR"] = extensions_folder(environ)
    for lock in Path(folder).glob("*/lock"):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if time.time() - lock.stat().st_mtime > _STALE_LOCK_SECONDS:
                lock.unlink()


def compile_op(name: str) -> None:
    """Compile an extension of `OPS`, or load it where it is compiled. Raises what DeepSpeed raises."""
    use_extensions_folder(os.environ)
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder(OPS[name].builder).load(verbose=False)


if __name__ == "__main__":
    for op_name in sys.argv[1:]:
        compile_op(op_name)
    if not sys.argv[1:]:
        print(extensions_folder(os.environ))
