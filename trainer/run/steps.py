"""One micro-batch: its random numbers and its way through the model."""

import numpy as np
import torch

from trainer.data.audio import SAMPLE_RATE
from trainer.data.collate import Batch
from trainer.model.pretraining import LossTerms
from trainer.run.engine import Engine

_LAYER_DROP_PURPOSE = 1


def seed_micro_batch(seed: int, step: int, position: int) -> None:
    """Seed dropout and Gumbel noise of the micro-batch at `position` of the window of update `step`.

    `position` counts over ranks and accumulation steps together, so the noise does not depend on how the window is
    split, and no generator state has to be kept in a checkpoint.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, position]).generate_state(1, np.uint64)[0]))


def dropped_layers(seed: int, step: int, num_layers: int, probability: float) -> tuple[int, ...]:
    """Layers that LayerDrop (Fan et al. 2020) leaves out of update `step`.

    One draw for the whole window, from numbers all ranks share: every rank and every micro-batch drops the same layers,
    however the window is split.
    """
    if probability == 0:
        return ()
    rng = np.random.default_rng([seed, step, _LAYER_DROP_PURPOSE])
    return tuple(np.flatnonzero(rng.random(num_layers) < probability).tolist())


def forward(engine: Engine, batch: Batch, gumbel_temperature: float = 1.0, dropped: tuple[int, ...] = ()) -> LossTerms:
    """Loss sums of one micro-batch on the engine's device."""
    tensors = {
        name: getattr(batch, name).to(engine.device, non_blocking=True)
        for name in ("input_values", "mask", "target_frames", "target_valid", "negatives")
    }
    if batch.num_samples is not None:
        tensors["num_samples"] = batch.num_samples  # read on the CPU: no wait for the device
    terms: LossTerms = engine.model(**tensors, gumbel_temperature=gumbel_temperature, dropped_layers=dropped)
    return terms


def audio_seconds(batch: Batch) -> float:
    """Seconds of audio in a micro-batch, without padding."""
    num_samples = batch.input_values.numel() if batch.num_samples is None else int(batch.num_samples.sum())
    return num_samples / SAMPLE_RATE
