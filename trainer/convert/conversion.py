"""From a checkpoint of a run to a folder that `from_pretrained` loads."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.convert.card import model_card, read_run
from trainer.convert.checkpoint import Checkpoint, find_checkpoint, open_checkpoint, read_json
from trainer.convert.dtypes import resolve_dtype
from trainer.convert.errors import ConversionError
from trainer.convert.foreign import find_foreign, open_foreign
from trainer.convert.plain import read_plain
from trainer.convert.verify import check_names, check_written, stock_shapes
from trainer.convert.weights import Weight
from trainer.convert.writer import check_destination, flushing, parse_size, plan_shards, published_folder, write_shards
from trainer.convert.zero import read_zero


class ConversionReport(NamedTuple):
    """What was converted. `num_parameters` counts the elements of all tensors in the folder, buffers included."""

    checkpoint: Path
    out: Path
    step: int
    engine: str
    dtype: str
    num_parameters: int
    num_bytes: int
    files: tuple[str, ...]
    verified: bool
    seconds: float


def convert(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = True,
    overwrite: bool = False,
    config_from: Path | None = None,
) -> ConversionReport:
    """Write the weights of a checkpoint, its configuration and a card into `out`, which appears whole or not at all.

    Args:
        source: a run folder (its newest complete checkpoint is taken), one step folder, or a checkpoint that another
            trainer saved through DeepSpeed: the folder given to accelerate's `save_state`, or to DeepSpeed's
            `save_checkpoint`, or the folder of one tag.
        out: a folder that is new or empty, or with `overwrite` an earlier model folder.
        dtype: fp32 (default), bf16 or fp16 for the floating-point weights.
        max_shard_size: largest size of one safetensors file, such as 5GB or 500MB.
        verify: check the input's checksums, compare the names with the stock model, and read the result back.
        overwrite: replace a model folder at `out`.
        config_from: folder with `config.json` and `preprocessor_config.json`; by default those of the checkpoint.

    Raises:
        ConversionError: an argument or the checkpoint is wrong; `out` is then as it was.
    """
    started = time.monotonic()
    target = resolve_dtype(dtype)
    max_shard_bytes = parse_size(max_shard_size)
    tag = find_foreign(source)
    folder = find_checkpoint(source) if tag is None else tag
    check_destination(out, folder, overwrite=overwrite)
    checkpoint = open_checkpoint(folder, checksums=verify) if tag is None else open_foreign(tag)
    if config_from is not None:
        checkpoint = checkpoint._replace(configuration=config_from)
    weights = read_weights(checkpoint)
    num_parameters = sum(math.prod(weight.shape) for weight in weights)
    with published_folder(out, overwrite=overwrite) as staging:
        write_configuration(staging, checkpoint, target, num_parameters)
        if verify:
            check_names(weights, stock_shapes(staging))
        write_shards(staging, plan_shards(weights, target, max_shard_bytes), target)
        if verify:
            with flushing(staging):
                check_written(staging, weights, target)
        sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
    return ConversionReport(
        checkpoint=folder,
        out=out,
        step=checkpoint.step,
        engine=checkpoint.engine,
        dtype=target,
        num_parameters=num_parameters,
        num_bytes=sum(sizes.values()),
        files=tuple(sizes),
        verified=verify,
        seconds=time.monotonic() - started,
    )


def read_weights(checkpoint: Checkpoint) -> Sequence[Weight]:
    """The model's state dict, not yet in memory.

    Raises:
        ConversionError: the checkpoint cannot be read.
    """
    if checkpoint.engine == "deepspeed":
        return read_zero(checkpoint.weights, world_size=checkpoint.world_size)
    return read_plain(checkpoint.weights)


def write_configuration(staging: Path, checkpoint: Checkpoint, dtype: str, num_parameters: int) -> None:
    """Copy the model's and the feature extractor's configuration, with the type of these weights, and add the card.

    Raises:
        ConversionError: a configuration is missing or unreadable.
    """
    config = _configuration(checkpoint, "config.json")
    preprocessor = _configuration(checkpoint, "preprocessor_config.json")
    _write_json(staging / "config.json", config | {"dtype": dtype})
    _write_json(staging / "preprocessor_config.json", preprocessor)
    card = model_card(
        config,
        read_run(checkpoint.folder, checkpoint.step),
        step=checkpoint.step,
        num_parameters=num_parameters,
        dtype=dtype,
        sampling_rate=preprocessor.get("sampling_rate", 16000),
    )
    (staging / "README.md").write_text(card, encoding="utf-8")


def _configuration(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    path = checkpoint.configuration / name
    if checkpoint.folder == checkpoint.weights and not path.is_file():
        raise ConversionError(
            f"{path}: missing; a checkpoint of another trainer holds weights alone. Give a folder with {name} by "
            "--config_from, such as that of a model saved with save_pretrained."
        )
    return read_json(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
