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
from trainer.data.masking import sample_negatives, span_mask, utterance_rng

_MASK_PURPOSE = 0  # the crop of an utterance draws from purpose 1, see loader.py


class Batch(NamedTuple):
    """B utterances of S samples, T frames, at most M masked frames, K negatives for each."""

    input_values: Tensor
    """Normalised waveforms, [B, S] float32."""
    mask: Tensor
    """True where a frame is masked, [B, T] bool."""
    target_frames: Tensor
    """Positions of the masked frames of each row in 0 .. T - 1, [B, M] int64; 0 where not valid."""
    target_valid: Tensor
    """False where a row has fewer than M masked frames, [B, M] bool."""
    negatives: Tensor
    """For each masked frame, indices into the M axis of the same row, [B, M, K] int64; 0 where not valid."""
    num_targets: int
    """Masked frames in the batch."""
    skipped: tuple[Skipped, ...] = ()
    """Files that could not be decoded and are not in the batch."""


@dataclass(frozen=True)
class MaskSettings:
    """How much is masked and contrasted: the arguments of ``span_mask`` and ``sample_negatives``."""

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
        ValueError: S samples give fewer than 2 frames.
    """
    num_frames = geometry.num_frames(len(waveforms[0]))
    masks, targets, negatives = [], [], []
    for utterance in utterances:
        rng = utterance_rng(seed, epoch, utterance, _MASK_PURPOSE)
        mask = span_mask(rng, num_frames, mask_settings.mask_prob, mask_settings.mask_length)
        masks.append(mask)
        targets.append(np.flatnonzero(mask))
        negatives.append(sample_negatives(rng, len(targets[-1]), mask_settings.num_negatives))
    counts = np.array([len(frames) for frames in targets])  # [B]
    return Batch(
        input_values=torch.from_numpy(np.stack(waveforms)),
        mask=torch.from_numpy(np.stack(masks)),
        target_frames=torch.from_numpy(_pad(targets)),
        target_valid=torch.from_numpy(np.arange(counts.max()) < counts[:, None]),
        negatives=torch.from_numpy(_pad(negatives)),
        num_targets=int(counts.sum()),
    )


def _pad(rows: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Stack arrays that differ in their first axis, filled up with 0."""
    padded = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), dtype=np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
