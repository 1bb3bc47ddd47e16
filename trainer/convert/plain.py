"""Reads the checkpoint of a run without DeepSpeed: one safetensors file with the full state dict."""

from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainer.convert.errors import ConversionError
from trainer.convert.weights import Weight


def read_plain(path: Path) -> list[Weight]:
    """The weights of a safetensors file, mapped from it.

    Raises:
        ConversionError: the file is not safetensors or is cut short.
    """
    try:
        handle: Any = safe_open(path, framework="pt")  # its methods carry no types
        names: list[str] = handle.keys()
        return [_weight(name, handle) for name in names]
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path}: not a readable safetensors file ({error}); copy the checkpoint again or take another one."
        ) from error


def _weight(name: str, handle: Any) -> Weight:
    tensor = handle.get_tensor(name)  # mapped from the file: no bytes are read before they are looked at
    return Weight(
        name, tuple(tensor.shape), tensor.dtype, partial(handle.get_tensor, name), slices=(tensor.reshape(-1),)
    )
