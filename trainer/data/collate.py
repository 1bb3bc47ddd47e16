"""Waveforms -> the tensors of one batch, with masks and negatives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.frames import FrameGeometry
from trainer.data.index import Skipped
from trainer.data.masking import MaskedFrames, draw_masks, utterance_rng


def mask_purpose(take: int) -> int:
    """What the mask of the n-th crop of an utterance draws from, see ``utterance_rng``."""
    return 2 * take


def crop_purpose(take: int) -> int:
    """What the place of the n-th crop of an utterance draws from."""
    return 2 * take + 1


class Batch(NamedTuple):
    """B utterances of S samples, T frames, at most M masked frames, K negatives for each."""

    input_values: Tensor
    """Normalised waveforms, [B, S] float32; 0 where padded."""
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
    num_samples: Tensor | None = None
    """Samples of each row before its padding, [B] int64; None where nothing is padded."""
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
    takes: Sequence[int] | None = None,
    multiple_of: int = 1,
) -> Batch:
    """Stack waveforms and draw a mask and negatives for each; shorter ones are padded with zeros.

    A row's mask and negatives come from (seed, epoch, utterance, take) and its own length, never from the rest of the
    batch, and no padded frame is masked, so none is a target or a negative.

    Args:
        waveforms: normalised, B arrays of shape [S_b].
        utterances: their utterance ids.
        takes: which of the epoch's crops of its utterance each is; None for the first.
        multiple_of: where waveforms are padded, S is a multiple of this many samples.

    Raises:
        ValueError: a waveform gives fewer than 2 frames, or more than 32,767 masked ones.
    """
    lengths = [len(waveform) for waveform in waveforms]
    rngs = [
        utterance_rng(seed, epoch, utterance, mask_purpose(take))
        for utterance, take in zip(utterances, takes or [0] * len(lengths), strict=True)
    ]
    width = max(lengths)
    if multiple_of > 1:
        width = -(-width // multiple_of) * multiple_of
    padded = width > min(lengths)
    if padded:
        masked = _draw_each(rngs, lengths, width, geometry, mask_settings)
    else:
        masked = _draw(rngs, geometry.num_frames(width), mask_settings)
    return Batch(
        input_values=_stack(waveforms, width),
        mask=torch.from_numpy(masked.mask),
        target_frames=torch.from_numpy(masked.target_frames),
        target_valid=torch.from_numpy(masked.target_valid),
        negatives=torch.from_numpy(masked.negatives),
        num_targets=int(masked.num_targets.sum()),
        num_samples=torch.tensor(lengths) if padded else None,
    )


def _stack(waveforms: Sequence[npt.NDArray[np.float32]], width: int) -> Tensor:
    stacked = np.zeros((len(waveforms), width), dtype=np.float32)
    for row, waveform in zip(stacked, waveforms, strict=True):
        row[: len(waveform)] = waveform
    return torch.from_numpy(stacked)


def _draw(rngs: Sequence[np.random.Generator], num_frames: int, settings: MaskSettings) -> MaskedFrames:
    return draw_masks(rngs, num_frames, settings.mask_prob, settings.mask_length, settings.num_negatives)


def _draw_each(
    rngs: Sequence[np.random.Generator],
    lengths: Sequence[int],
    width: int,
    geometry: FrameGeometry,
    settings: MaskSettings,
) -> MaskedFrames:
    """Masks of rows of unlike lengths, each drawn for its own frames, in arrays as wide as the batch."""
    rows = [_draw([rng], geometry.num_frames(length), settings) for rng, length in zip(rngs, lengths, strict=True)]
    num_targets = np.array([int(row.num_targets[0]) for row in rows])
    shape = len(rows), int(num_targets.max())
    mask = np.zeros((len(rows), geometry.num_frames(width)), dtype=np.bool_)
    target_frames = np.zeros(shape, dtype=np.int64)
    # M is the contiguous axis, as draw_masks has it
    negatives = np.zeros((len(rows), settings.num_negatives, shape[1]), dtype=np.int16).transpose(0, 2, 1)
    for number, (row, count) in enumerate(zip(rows, num_targets.tolist(), strict=True)):
        mask[number, : row.mask.shape[1]] = row.mask[0]
        target_frames[number, :count] = row.target_frames[0]
        negatives[number, :count] = row.negatives[0]
    return MaskedFrames(mask, target_frames, np.arange(shape[1]) < num_targets[:, None], negatives, num_targets)
