"""Reads the checkpoint of a run without DeepSpeed: one safetensors file with the full state dict."""

from pathlib import Path

from trainer.convert.safetensors_file import read_header
from trainer.convert.weights import Weight


def read_plain(path: Path) -> list[Weight]:
    """The weights of a safetensors file, in the order of their names; nothing of them is read yet.

    Raises:
        ConversionError: the file is not safetensors or is cut short.
    """
    return [
        Weight(name, entry.shape, entry.dtype, (entry.extent,)) for name, entry in sorted(read_header(path).items())
    ]
