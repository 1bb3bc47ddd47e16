"""Waveforms of one length -> the tensors of one batch, with masks and negatives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.frames import FrameGeometry
from trainer.data.index import Skipped
from trainer.data.masking import draw_masks, utterance_rng

_MASK_PURPOSE = 0  # the crop of an utterance draws from purpose 1, see loader.py


class Batch(NamedTuple):
    """B utterances of S samples, T frames, at most M masked frames, K negatives for each."""

    input_values: Tensor
    """Normalised waveforms, [B, S] float32."""
    mask: Tensor
    """True where a frame is masked, [B, T] bool."""
    target_frames: Tensor
    """Positions of the masked frames of each row in 0 .. T - 1, in random order, [B, M] int64; 0 where not valid."""
    target_valid: Tensor
    """False where a row has fewer than M masked frames, [B, M] bool."""
    negatives: Tensor
    """For each masked frame, indices into the M axis of the same row, [B, M, K] int16; 0 where not valid.

    Torch indexes with int64 only. A view whose M axis is the contiguous one, see masking.py.
    """
    num_targets: int
    """Masked frames in the batch."""
    skipped: tuple[Skipped, ...] = ()
    """Files that could not be decoded and are not in the batch."""


@dataclass(frozen=True)
class MaskSettings:
    """How much is masked and contrasted: arguments of ``draw_masks``."""

    mask_prob: float
    mask_length: int
    num_negatives: int


def collate(
    waveforms: Sequence[npt.NDArray[np.float32]],
    utterances: Sequence[int],
    epoch: int,
    seed: int,
    geometry: FrameGeometry,
    mask_settings: MaskSettings,
) -> Batch:
    """Stack waveforms of equal length and draw a mask and negatives for each.

    A row's mask and negatives come from (seed, epoch, utterance) and its length, never from the rest of the batch.

    Args:
        waveforms: normalised, B arrays of shape [S].
        utterances: their utterance ids.

    Raises:
        ValueError: S samples give fewer than 2 frames, or more than 32,767 masked ones.
    """
    rngs = [utterance_rng(seed, epoch, utterance, _MASK_PURPOSE) for utterance in utterances]
    masked = draw_masks(
        rngs,
        geometry.num_frames(len(waveforms[0])),
        mask_settings.mask_prob,
        mask_settings.mask_length,
        mask_settings.num_negatives,
    )
    return Batch(
        input_values=torch.from_numpy(np.stack(waveforms)),
        mask=torch.from_numpy(masked.mask),
        target_frames=torch.from_numpy(masked.target_frames),
        target_valid=torch.from_numpy(masked.target_valid),
        negatives=torch.from_numpy(masked.negatives),
        num_targets=int(masked.num_targets.sum()),
    )
