"""Makes sure that a converted folder is what it should be: the stock model's keys, and the checkpoint's values."""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.convert.archive import ReadBlock, check_blocks
from trainer.convert.errors import ConversionError
from trainer.convert.stock import state_dict_shapes
from trainer.convert.stream import BlockReader, on_all_cores, read_exactly
from trainer.convert.weights import Weight, as_bytes, output_dtype, same_bits
from trainer.convert.writer import INDEX_NAME, TYPE_NAMES


def stock_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every entry in the state dict of the transformers class that `config.json` names.

    They are known without transformers for the two classes that the trainer trains (`stock.py`). For another one the
    model is built without storage; that takes as long as importing transformers, seconds.

    Raises:
        ConversionError: transformers cannot read the configuration or has no such class.
    """
    known = state_dict_shapes(_read(folder / "config.json"), _read(folder / "preprocessor_config.json"))
    if known is not None:
        return known
    import transformers

    extractors: Any = transformers.AutoFeatureExtractor  # its methods carry no types
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        extractors.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{folder}: transformers cannot load it ({error}); take another checkpoint.") from error
    name = (config.architectures or [None])[0]
    architecture = getattr(transformers, name, None) if name else None
    if architecture is None:
        raise ConversionError(
            f"{folder / 'config.json'}: architectures ({config.architectures}) must name a class of transformers, "
            "such as Wav2Vec2ForPreTraining; correct the entry."
        )
    with torch.device("meta"):
        model = architecture(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def check_names(weights: Sequence[Weight], expected: dict[str, tuple[int, ...]]) -> None:
    """Compare names and shapes of the checkpoint with those of the stock model.

    Raises:
        ConversionError: a weight is missing, unknown or of another shape.
    """
    found = {weight.name: weight.shape for weight in weights}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not a weight of the stock model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])} where the stock model has {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        listed = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ConversionError(f"checkpoint: {listed}. config.json does not describe the model that was saved.")


def check_written(folder: Path, weights: Sequence[Weight], dtype: torch.dtype) -> None:
    """Read every tensor of `folder` back and compare it, bit by bit, with the checkpoint, which is read anew.

    What is read of the checkpoint is held against the CRC-32 of its archives on the way.

    Raises:
        ConversionError: a tensor is missing or double, has another shape or type, differs from the checkpoint, or has a
            value that is not finite; or the checkpoint is damaged.
    """
    wanted = {weight.name: weight for weight in weights}
    blocks: list[ReadBlock] = []
    with BlockReader() as reader:
        for path in _listed_files(folder):
            _check_file(path, wanted, dtype, reader, blocks)
    if wanted:
        raise ConversionError(f"{folder.name}: {next(iter(wanted))} was not written; convert again.")
    check_blocks(blocks)


def _listed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if not index.exists():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _check_file(
    path: Path, wanted: dict[str, Weight], dtype: torch.dtype, reader: BlockReader, blocks: list[ReadBlock]
) -> None:
    """Compare the weights of one file and take them out of `wanted`; note in `blocks` what was read for it."""
    expected = []
    with safe_open(path, framework="pt") as shard:
        names: list[str] = shard.keys()
        for name in names:
            if name not in wanted:
                raise ConversionError(f"{path.name}: {name} should not be in this file; convert again.")
            weight = wanted.pop(name)
            entry = shard.get_slice(name)
            if (tuple(entry.get_shape()), entry.get_dtype()) != (weight.shape, TYPE_NAMES[output_dtype(weight, dtype)]):
                raise ConversionError(f"{path.name}: {name} has another shape or type than was asked for.")
            expected.append(weight)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))

        def compare(weight: Weight) -> None:
            position = 8 + header_bytes + header[weight.name]["data_offsets"][0]
            for block in reader.blocks(weight):
                wanted_values = block.values.to(output_dtype(weight, dtype))
                written = torch.empty_like(wanted_values)
                read_exactly(file.fileno(), written, position, path)
                _check_block(path, weight, block.values, wanted_values, written)
                if block.extent is not None:
                    blocks.append(ReadBlock(block.extent, zlib.crc32(as_bytes(block.values).numpy().data)))
                position += written.numel() * written.itemsize

        on_all_cores(compare, expected)


def _check_block(path: Path, weight: Weight, source: torch.Tensor, wanted: torch.Tensor, written: torch.Tensor) -> None:
    if not same_bits(written, wanted):
        raise ConversionError(
            f"{path.name}: {weight.name} differs from the checkpoint; check the disk and convert again."
        )
    if not _all_finite(written):
        if _all_finite(source):
            raise ConversionError(f"dtype ({written.dtype}) cannot hold the values of {weight.name}; use fp32 or bf16.")
        raise ConversionError(f"checkpoint: {weight.name} has values that are not finite; take an earlier checkpoint.")


def _all_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # NaN and infinities reach the extremes; `isfinite().all()` takes twenty times the CPU time.
    least, most = tensor.aminmax()
    return math.isfinite(least) and math.isfinite(most)
