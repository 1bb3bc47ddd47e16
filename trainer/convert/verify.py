"""Makes sure that a converted folder is what it should be: the stock model's keys, and the checkpoint's values."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.convert.errors import ConversionError
from trainer.convert.weights import Weight, output_dtype, same_bits
from trainer.convert.writer import INDEX_NAME


def stock_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every entry in the state dict of the transformers class that `config.json` names.

    The model is built without storage, so this costs neither memory nor time, whatever its size.

    Raises:
        ConversionError: transformers cannot read the configuration or has no such class.
    """
    import transformers  # takes seconds, and only the verification needs it

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
    """Read every tensor of `folder` back through safetensors and compare it, bit by bit, with the checkpoint.

    Raises:
        ConversionError: a tensor is missing or double, differs from the checkpoint, or has a value that is not finite.
    """
    wanted = {weight.name: weight for weight in weights}
    for path in _listed_files(folder):
        with safe_open(path, framework="pt") as shard:
            names: list[str] = shard.keys()
            for name in names:
                if name not in wanted:
                    raise ConversionError(f"{path.name}: {name} should not be in this file; convert again.")
                _check_tensor(path, wanted.pop(name), shard.get_tensor(name), dtype)
    if wanted:
        raise ConversionError(f"{folder.name}: {next(iter(wanted))} was not written; convert again.")


def _listed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if not index.exists():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _check_tensor(path: Path, weight: Weight, written: torch.Tensor, dtype: torch.dtype) -> None:
    source = weight.read()
    if not _all_finite(written):
        if _all_finite(source):
            raise ConversionError(f"dtype ({written.dtype}) cannot hold the values of {weight.name}; use fp32 or bf16.")
        raise ConversionError(f"checkpoint: {weight.name} has values that are not finite; take an earlier checkpoint.")
    if not same_bits(written, source.to(output_dtype(weight, dtype))):
        raise ConversionError(
            f"{path.name}: {weight.name} differs from the checkpoint; check the disk and convert again."
        )


def _all_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # NaN and infinities reach the extremes; `isfinite().all()` takes twenty times the CPU time.
    least, most = tensor.aminmax()
    return math.isfinite(least) and math.isfinite(most)
