"""Which frames are masked and which of them serve as negatives, for all utterances of a batch at once.

Mask spans follow fairseq's ``compute_mask_indices`` (static lengths, overlaps allowed) and wav2vec 2.0
(arXiv:2006.11477, section 3.1); negatives come from the masked frames of the same utterance (section 3.2).

What an utterance gets is a function of its own generator and of its length: nothing passes between the rows of a batch.
It is the same on every platform: generators are keyed by BLAKE2b, masks and negatives read their raw 64-bit words only
(NumPy promises that stream, and not the results of ``Generator.choice`` and the like), and compute with integers.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

_Words = npt.NDArray[np.uint32]

_MAX_TARGETS = int(np.iinfo(np.int16).max)


class MaskedFrames(NamedTuple):
    """The masked frames of B utterances of T frames: at most M in one, K negatives for each."""

    mask: npt.NDArray[np.bool_]
    """True where a frame is masked, [B, T]."""
    target_frames: npt.NDArray[np.int64]
    """Positions of the masked frames of each row in 0 .. T - 1, in random order, [B, M]; 0 where not valid."""
    target_valid: npt.NDArray[np.bool_]
    """False where a row has fewer than M masked frames, [B, M]."""
    negatives: npt.NDArray[np.int16]
    """For each masked frame, indices into the M axis of the same row, [B, M, K]; 0 where not valid.

    A view whose M axis is the contiguous one.
    """
    num_targets: npt.NDArray[np.int64]
    """Masked frames of each row, [B]."""


def utterance_rng(seed: int, epoch: int, utterance: int, purpose: int) -> np.random.Generator:
    """Generator that belongs to one use of one utterance in one epoch.

    The same on every platform, rank and worker. All four numbers must be in 0 .. 2**64 - 1; they are hashed whole, so
    different numbers give unrelated sequences.
    """
    key = _Key(seed, epoch, utterance, purpose)
    return np.random.Generator(np.random.SFC64(key))  # type: ignore[arg-type]  # NumPy's stubs know only SeedSequence


class _Key(ISeedSequence):
    """Hands the BLAKE2b hash of four integers to SFC64 as its seed, in a quarter of ``SeedSequence``'s time."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint32) -> npt.NDArray[np.uint32 | np.uint64]:
        digest = hashlib.blake2b(struct.pack("<4Q", *self.numbers), digest_size=8 * n_words).digest()
        return np.array(struct.unpack(f"<{n_words}Q", digest), dtype=dtype)


def draw_masks(
    rngs: Sequence[np.random.Generator],
    num_frames: int,
    mask_prob: float,
    mask_length: int,
    num_negatives: int,
    min_masked_frames: int = 2,
) -> MaskedFrames:
    """Draw masked spans and negatives for utterances of equal length.

    Args:
        rngs: one for each utterance, with a bit generator of 64-bit words.
        num_frames: T, at least 2.
        mask_prob: sum of the span lengths over T, before overlaps.
        mask_length: frames per span; shortened to T - 1 where T is not longer.
        num_negatives: K.
        min_masked_frames: spans are added until this many frames (or all T) are sure to be masked; at least 2.

    Raises:
        ValueError: a number is out of its range, or an utterance has more masked frames than int16 can index.
    """
    if not rngs:
        raise ValueError("rngs is empty; a batch holds at least one utterance.")
    if num_frames < 2:
        raise ValueError(f"num_frames ({num_frames}) must be at least 2 to mask one and contrast it with another.")
    if min_masked_frames < 2:
        raise ValueError(f"min_masked_frames ({min_masked_frames}) must be at least 2: no frame is its own negative.")
    span = min(mask_length, num_frames - 1)
    num_starts = num_frames - span + 1
    num_words = 1 + num_starts + num_negatives + num_frames
    words = _words(rngs, num_words)  # [B, num_words]

    value = mask_prob * num_frames / mask_length
    fewest = max(1, min_masked_frames - span + 1)  # n distinct starts cover at least n + span - 1 frames
    num_spans = [min(max(n, fewest), num_starts) for n in _round_at_random(value, words[:, 0])]
    mask = _mask_spans(words[:, 1 : 1 + num_starts], num_spans, span)

    num_targets = mask.sum(axis=1)
    most = int(num_targets.max())
    if most > _MAX_TARGETS:
        raise ValueError(
            f"masked frames of an utterance ({most}) must be at most {_MAX_TARGETS}, the largest index of the batch's "
            "int16; lower max_duration_in_seconds."
        )
    offsets, keys = np.split(words[:, 1 + num_starts :], [num_negatives], axis=1)  # [B, K], [B, T]
    target_valid = np.arange(most) < num_targets[:, None]  # [B, M]
    target_frames = _in_random_order(mask, keys)[:, :most] * target_valid
    negatives = _negatives(offsets, num_targets, most)
    return MaskedFrames(mask, target_frames, target_valid, negatives, num_targets)


def _words(rngs: Sequence[np.random.Generator], num_words: int) -> _Words:
    """The next 32-bit words of each generator, two of every raw 64-bit word, low half first: [B, num_words]."""
    raw = np.empty((len(rngs), (num_words + 1) // 2), dtype="<u8")
    for row, rng in zip(raw, rngs, strict=True):
        row[:] = rng.bit_generator.random_raw(len(row))
    return raw.view("<u4")[:, :num_words]


def _round_at_random(value: float, words: _Words) -> list[int]:
    """``int(value + U(0, 1))`` for each word: one more than ``int(value)`` as often as the fraction says."""
    whole = int(value)
    threshold = int((value - whole) * 2**32)
    return [whole + (word < threshold) for word in words.tolist()]


def _mask_spans(keys: _Words, num_spans: list[int], span: int) -> npt.NDArray[np.bool_]:
    """Spans start where the ``num_spans`` smallest of a row's random ``keys`` [B, T - span + 1] are: the mask, [B, T].

    Starts are found by value, so the order of equal keys does not matter: a key equal to the largest of them (odds
    below T / 2**32) adds a span, on every platform.
    """
    num_starts = keys.shape[1]
    # sorted whole: NumPy sorts with SIMD, and np.partition at more than one place does not
    largest = np.sort(keys, axis=1)[np.arange(len(keys)), np.array(num_spans) - 1]
    mask = np.zeros((len(keys), num_starts + span - 1), dtype=np.bool_)
    np.less_equal(keys, largest[:, None], out=mask[:, :num_starts])
    flat = mask.ravel()  # a view; no span reaches past the end of its row
    reach = 1  # frames that are masked from each start on
    while reach < span:
        step = min(reach, span - reach)
        flat[step:] |= flat[:-step]
        reach += step
    return mask


def _in_random_order(mask: npt.NDArray[np.bool_], keys: _Words) -> npt.NDArray[np.int64]:
    """Positions of the masked frames of each row, shuffled by random ``keys``: int64 [B, T], past them anything."""
    # the position in the low half: no two are equal, so every sort gives the same order
    ranked = np.left_shift(keys, 32, dtype=np.uint64) | np.arange(mask.shape[1], dtype=np.uint64)
    ranked[~mask] = np.iinfo(np.uint64).max
    ranked.sort(axis=1)
    return (ranked & 0xFFFFFFFF).astype(np.int64)


def _negatives(words: _Words, num_targets: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int16]:
    """For each masked frame K others of its row, uniformly with replacement: int16 [B, M, K], 0 past ``num_targets``.

    The m masked frames of a row stand on a ring in random order, slot by slot, and K distances d_k are drawn from
    1 .. m - 1:

        negative(slot, k) = (slot + d_k) mod m

    The d_k are independent and uniform, and so are the K negatives of a frame; it is never its own. Frames of a row
    share the distances but stand at random places. What shows of that is a balance: each frame serves exactly K times,
    and never for two frames as their k-th.

    Why: independent draws are K x m random numbers per row, which alone take longer than all of this. Here they are
    K + m, a sort, and K copies of a stretch of the ring.

    Args:
        words: random 32-bit words, [B, K].
        num_targets: m of each row, at least 2, [B].
        most: M, the largest of them.
    """
    # 1 .. m - 1; each has a probability within 2**-32 of 1 / (m - 1).
    distances = 1 + ((words * (num_targets - 1).astype(np.uint64)[:, None]) >> 32).astype(np.int64)
    twice = np.arange(2 * most, dtype=np.uint16)
    # x mod m, for x < 2 m, is the smaller one of x and x - m: where that is negative it wraps to a large number.
    rings = np.minimum(twice, twice - num_targets.astype(np.uint16)[:, None])  # [B, 2 M]: 0 .. m - 1, 0 .. m - 1
    # M slots of a ring, from any slot on, read as one item, which NumPy copies whole.
    stretches = np.ndarray((rings.size - most + 1,), np.dtype((np.void, 2 * most)), rings, strides=(2,))
    starts = distances + np.arange(0, rings.size, 2 * most)[:, None]
    negatives = stretches[starts].view(np.int16).reshape(*words.shape, most)  # [B, K, M]
    for row, count in zip(negatives, num_targets.tolist(), strict=True):
        row[:, count:] = 0
    return negatives.transpose(0, 2, 1)
