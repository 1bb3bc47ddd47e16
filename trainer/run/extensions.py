"""Where DeepSpeed's compiled C++ extensions go: one folder per Python, torch and DeepSpeed version.

Two DeepSpeed versions that share torch's default folder load each other's binaries and fail with missing attributes.
`python -m trainer.run.extensions` prints the folder, for `launch/env.sh`.
"""

import os
import sys
from collections.abc import MutableMapping
from importlib.metadata import version
from pathlib import Path


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
    """Point torch at the folder; call it before DeepSpeed compiles or loads anything."""
    environ["TORCH_EXTENSIONS_DIR"] = extensions_folder(environ)


if __name__ == "__main__":
    print(extensions_folder(os.environ))
