"""Which frames are masked and which of them serve as negatives: pure functions of a generator.

Mask spans follow fairseq's ``compute_mask_indices`` (static lengths, overlaps allowed) and wav2vec 2.0
(arXiv:2006.11477, section 3.1); negatives come from the masked frames of the same utterance (section 3.2).
"""

import numpy as np
import numpy.typing as npt


def utterance_rng(seed: int, epoch: int, utterance: int, purpose: int) -> np.random.Generator:
    """Generator that belongs to one use of one utterance in one epoch.

    The same on every platform, rank and worker. All four numbers must be in 0 .. 2**32 - 1: each is then one word of
    the seed, so different numbers cannot give the same sequence of words.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, utterance, purpose])))


def span_mask(
    rng: np.random.Generator, num_frames: int, mask_prob: float, mask_length: int, min_masked_frames: int = 2
) -> npt.NDArray[np.bool_]:
    """Draw masked spans: ``int(mask_prob * num_frames / mask_length + U(0, 1))`` distinct starts, spans may overlap.

    Args:
        rng: consumed in a fixed order.
        num_frames: T, at least 2.
        mask_prob: sum of the span lengths over T, before overlaps.
        mask_length: frames per span; shortened to T - 1 where T is not longer.
        min_masked_frames: spans are added until this many frames (or all T) are sure to be masked.

    Returns:
        Boolean mask, shape [T], true where masked.

    Raises:
        ValueError: fewer than 2 frames.
    """
    if num_frames < 2:
        raise ValueError(f"num_frames ({num_frames}) must be at least 2 to mask one and contrast it with another.")
    span = min(mask_length, num_frames - 1)
    num_starts = num_frames - span + 1
    num_spans = int(mask_prob * num_frames / mask_length + rng.random())
    # n distinct starts cover at least n + span - 1 frames.
    num_spans = min(max(num_spans, 1, min_masked_frames - span + 1), num_starts)
    starts = rng.choice(num_starts, num_spans, replace=False, shuffle=False)
    depth = np.zeros(num_frames + 1, dtype=np.int64)  # spans opened minus spans closed at each frame
    depth[starts] += 1
    depth[starts + span] -= 1
    return np.cumsum(depth[:-1]) > 0


def sample_negatives(rng: np.random.Generator, num_masked: int, num_negatives: int) -> npt.NDArray[np.int64]:
    """Draw for each masked frame ``num_negatives`` others, uniformly with replacement.

    Returns:
        int64, shape [num_masked, num_negatives]: positions among the masked frames, 0 .. num_masked - 1, in row i
        never i itself.

    Raises:
        ValueError: fewer than 2 masked frames.
    """
    if num_masked < 2:
        raise ValueError(f"num_masked ({num_masked}) must be at least 2: a frame is never its own negative.")
    sampled = rng.integers(0, num_masked - 1, size=(num_masked, num_negatives), dtype=np.int64)
    return sampled + (sampled >= np.arange(num_masked)[:, None])  # skips the frame's own position
