"""Makes sure that a converted folder is what it should be: the stock model's keys, and the checkpoint's values."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.convert.archive import ReadExtent, check_read
from trainer.convert.dtypes import ITEM_BYTES, all_finite, cast
from trainer.convert.errors import ConversionError
from trainer.convert.safetensors_file import Entry, read_header
from trainer.convert.stock import state_dict_shapes
from trainer.convert.stream import BLOCK_BYTES, OpenFiles, blocks, on_all_cores
from trainer.convert.weights import Weight, output_dtype
from trainer.convert.writer import INDEX_NAME

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
    import torch
    import transformers

    extractors: Any = transformers.AutoFeatureExtractor  # its methods carry no types
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        extractors.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{folder}: transformers cannot load it ({error}); take another checkpoint.") from error
    name = (config.architectures or [None])[0]
    architecture = getattr(transformers, name, None) if name else None
    if not isinstance(architecture, type) or not issubclass(architecture, transformers.PreTrainedModel):
        raise ConversionError(
            f"{folder / 'config.json'}: architectures ({config.architectures}) must name a model of transformers, "
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


def check_written(folder: Path, weights: Sequence[Weight], dtype: str) -> None:
    """Read every tensor of `folder` back and compare it, bit by bit, with the checkpoint, which is read anew.

    What is read of the checkpoint is held against the CRC-32 of its archives on the way.

    Raises:
        ConversionError: a tensor is missing or double, has another shape or type, differs from the checkpoint, or has a
            value that is not finite; or the checkpoint is damaged.
    """
    wanted = {weight.name: weight for weight in weights}
    pairs: list[tuple[Weight, Entry]] = []
    for path in _listed_files(folder):
        pairs += _pairs(path, wanted, dtype)
    if wanted:
        raise ConversionError(f"{folder.name}: {next(iter(wanted))} was not written; convert again.")
    found: list[ReadExtent] = []
    with OpenFiles() as files:
        on_all_cores(lambda pair: found.extend(_compare(*pair, files)), pairs)
    check_read(found)


def _listed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if not index.exists():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _pairs(path: Path, wanted: dict[str, Weight], dtype: str) -> list[tuple[Weight, Entry]]:
    """The weights of one file, which are taken out of `wanted`, and where they should be in it."""
    pairs = []
    for name, entry in read_header(path).items():
        if name not in wanted:
            raise ConversionError(f"{path.name}: {name} should not be in this file; convert again.")
        weight = wanted.pop(name)
        if (entry.shape, entry.dtype) != (weight.shape, output_dtype(weight, dtype)):
            raise ConversionError(f"{path.name}: {name} has another shape or type than was asked for.")
        pairs.append((weight, entry))
    return pairs


def _compare(weight: Weight, entry: Entry, files: OpenFiles) -> list[ReadExtent]:
    """What was read of the checkpoint for a weight that was found to be written as it should."""
    import numpy as np

    size = min(BLOCK_BYTES, weight.num_bytes)
    source_buffer = np.empty(size, np.uint8)
    written_buffer = np.empty(size // ITEM_BYTES[weight.dtype] * ITEM_BYTES[entry.dtype], np.uint8)
    path, position, _ = entry.extent
    found = []
    for extent in weight.extents:
        crc = 0
        for source_path, start, stop in blocks(extent):
            source = source_buffer[: stop - start]
            files.read(source_path, start, source.data)
            crc = zlib.crc32(source.data, crc)
            expected = cast(source, weight.dtype, entry.dtype)
            written = written_buffer[: len(expected)]
            files.read(path, position, written.data)
            _check_block(weight, entry, source, expected, written)
            position += len(written)
        found.append(ReadExtent(extent, crc))
    return found


def _check_block(
    weight: Weight,
    entry: Entry,
    source: "NDArray[np.uint8]",
    expected: "NDArray[np.uint8]",
    written: "NDArray[np.uint8]",
) -> None:
    if not _same(written, expected):
        raise ConversionError(
            f"{entry.extent.path.name}: {weight.name} differs from the checkpoint; check the disk and convert again."
        )
    if not all_finite(written, entry.dtype):
        if all_finite(source, weight.dtype):
            raise ConversionError(f"dtype ({entry.dtype}) cannot hold the values of {weight.name}; use fp32 or bf16.")
        raise ConversionError(f"checkpoint: {weight.name} has values that are not finite; take an earlier checkpoint.")


def _same(left: "NDArray[np.uint8]", right: "NDArray[np.uint8]") -> bool:
    if len(left) % 8 == 0:  # eight bytes at a time
        left, right = left.view("uint64"), right.view("uint64")
    return bool((left == right).all())
