"""Reads what a run needs to go on, weights and the state of AdamW, by parameter and not by rank.

Resuming on other ranks or in another engine takes it from here, and so does the universal checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.convert.errors import ConversionError
from trainer.convert.plain import read_plain
from trainer.convert.safe_load import StoredTensor, read_count, safe_load
from trainer.convert.weights import Weight, whole, zeros
from trainer.convert.zero import MOMENTS, Moments, read_zero_training
from trainer.layout import DEEPSPEED_FOLDER, OPTIMIZER_NAMES_KEY, PLAIN_MODEL_FILE, PLAIN_OPTIMIZER_FILE


class TrainingState(NamedTuple):
    """The model's whole state dict, and AdamW's moments of the parameters that it trains."""

    weights: list[Weight]
    moments: Moments


def read_training_state(folder: Path, *, engine: str, world_size: int) -> TrainingState:
    """Open one step folder; tensors come into memory one at a time, when they are read.

    Raises:
        ConversionError: the checkpoint cannot be read, or holds the state of another optimizer than AdamW.
    """
    if engine == "deepspeed":
        return TrainingState(*read_zero_training(folder / DEEPSPEED_FOLDER, world_size=world_size))
    weights = read_plain(folder / PLAIN_MODEL_FILE)
    return TrainingState(weights, _plain_moments(folder / PLAIN_OPTIMIZER_FILE, weights))


def _plain_moments(path: Path, weights: Sequence[Weight]) -> Moments:
    state = safe_load(path)
    if OPTIMIZER_NAMES_KEY not in state:
        raise ConversionError(
            f"{path}: does not tell which parameter is which; resume it once with plain PyTorch (without --deepspeed), "
            "which writes a checkpoint that does."
        )
    shapes = {weight.name: weight.shape for weight in weights}
    of: dict[str, dict[str, Weight]] = {key: {} for key in MOMENTS}
    for number, name in enumerate(state[OPTIMIZER_NAMES_KEY]):
        entry = state["state"].get(number)
        for key in MOMENTS:
            if entry is None:  # without a gradient so far
                of[key][name] = zeros(name, shapes[name])
                continue
            moment = entry.get(key)
            if not isinstance(moment, StoredTensor) or moment.shape != shapes.get(name):
                raise ConversionError(f"{path}: has no {key} of the shape of {name}; take another checkpoint.")
            of[key][name] = whole(name, moment)
    num_updates = max((read_count(entry["step"]) for entry in state["state"].values()), default=0)
    return Moments(of, num_updates, state["param_groups"])
