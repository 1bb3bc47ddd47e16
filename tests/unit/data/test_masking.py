import hashlib
import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.masking import MaskedFrames, draw_masks, utterance_rng

numbers = st.integers(0, 2**32 - 1)


def draw(
    utterances: Iterable[int],
    num_frames: int,
    mask_prob: float = 0.65,
    mask_length: int = 10,
    num_negatives: int = 3,
    min_masked_frames: int = 2,
) -> MaskedFrames:
    rngs = [utterance_rng(0, 0, utterance, 0) for utterance in utterances]
    return draw_masks(rngs, num_frames, mask_prob, mask_length, num_negatives, min_masked_frames)


def all_masked(num_rows: int, num_frames: int, num_negatives: int) -> MaskedFrames:
    """Every frame is a target, so that all rows have equally many."""
    return draw(range(num_rows), num_frames, mask_length=1, num_negatives=num_negatives, min_masked_frames=num_frames)


def negative_frames(drawn: MaskedFrames) -> npt.NDArray[np.int64]:
    """Of rows in which every frame is a target: the frames that are the negatives of each frame, [B, T, K]."""
    rows = np.arange(len(drawn.mask))[:, None]
    frames = drawn.target_frames[rows[:, :, None], drawn.negatives]  # [B, M, K], by slot
    by_frame = np.empty_like(frames)
    by_frame[rows, drawn.target_frames] = frames
    return by_frame


def assert_fits(observed: npt.ArrayLike, expected: npt.ArrayLike, degrees: int) -> None:
    """Pearson's chi-square test at 5 sigma (odds of 1 in 3.5 million), limit by Wilson and Hilferty."""
    observed, expected = np.asarray(observed, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 5 * np.sqrt(2 / (9 * degrees))) ** 3


@settings(deadline=None)
@given(st.tuples(numbers, numbers, numbers, numbers), st.tuples(numbers, numbers, numbers, numbers))
def test_generators_depend_on_all_four_numbers(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    def words(key: tuple[int, ...]) -> list[int]:
        return [int(number) for number in utterance_rng(*key).integers(0, 2**63, size=2)]

    assert words(one) == words(one)
    assert (words(one) == words(other)) == (one == other)


def test_generator_is_the_same_on_every_platform() -> None:
    rng = utterance_rng(1, 2, 3, 4)
    assert [int(word) for word in rng.bit_generator.random_raw(2)] == [2338845881362401005, 13593004720180613578]


@pytest.mark.parametrize(
    "utterance, num_frames, digest",
    [
        (0, 2, "222cb9d9059cbdd4"),
        (3, 40, "74bacac2e2fb7e89"),
        (7, 750, "754336bec21a98de"),
        (4294967295, 1501, "03ac4f829d4f2b4f"),
    ],
)
def test_masks_are_the_same_on_every_platform(utterance: int, num_frames: int, digest: str) -> None:
    drawn = draw_masks([utterance_rng(1, 2, utterance, 0)], num_frames, 0.65, 10, 100)
    stored = b"".join(
        [
            np.packbits(drawn.mask).tobytes(),
            drawn.target_frames.astype("<i8").tobytes(),
            drawn.negatives.astype("<i2").tobytes(),
        ]
    )
    assert hashlib.sha256(stored).hexdigest()[:16] == digest


@settings(deadline=None, max_examples=300)
@given(
    utterances=st.lists(numbers, min_size=1, max_size=5),
    num_frames=st.integers(2, 300),
    mask_prob=st.floats(0, 1),
    mask_length=st.integers(1, 400),
    num_negatives=st.integers(1, 20),
    min_masked_frames=st.integers(2, 5),
)
def test_rows_of_any_length(
    utterances: list[int],
    num_frames: int,
    mask_prob: float,
    mask_length: int,
    num_negatives: int,
    min_masked_frames: int,
) -> None:
    drawn = draw(utterances, num_frames, mask_prob, mask_length, num_negatives, min_masked_frames)
    assert [array.dtype for array in drawn] == [np.bool_, np.int64, np.bool_, np.int16, np.int64]
    most = drawn.num_targets.max()
    assert drawn.mask.shape == (len(utterances), num_frames)
    assert drawn.target_frames.shape == drawn.target_valid.shape == (len(utterances), most)
    assert drawn.negatives.shape == (len(utterances), most, num_negatives)
    for row, count in enumerate(drawn.num_targets):
        mask, negatives = drawn.mask[row], drawn.negatives[row]
        assert count >= min(min_masked_frames, num_frames)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
        assert (edges[1::2] - edges[::2]).min() >= min(mask_length, num_frames - 1)
        assert sorted(drawn.target_frames[row, :count].tolist()) == np.flatnonzero(mask).tolist()
        assert not drawn.target_frames[row, count:].any()
        assert drawn.target_valid[row].tolist() == [True] * count + [False] * (most - count)
        assert negatives.min() >= 0
        assert negatives.max() < count
        assert not (negatives[:count] == np.arange(count)[:, None]).any()
        assert not negatives[count:].any()


@settings(deadline=None)
@given(utterances=st.lists(numbers, min_size=1, max_size=7), num_frames=st.integers(2, 200))
def test_a_row_does_not_depend_on_the_others(utterances: list[int], num_frames: int) -> None:
    together = draw(utterances, num_frames)
    for row, utterance in enumerate(utterances):
        alone = draw([utterance], num_frames)
        count = alone.num_targets[0]
        assert together.num_targets[row] == count
        np.testing.assert_array_equal(together.mask[row], alone.mask[0])
        np.testing.assert_array_equal(together.target_frames[row, :count], alone.target_frames[0])
        np.testing.assert_array_equal(together.negatives[row, :count], alone.negatives[0])


@pytest.mark.parametrize("num_frames", [0, 1])
def test_too_few_frames(num_frames: int) -> None:
    with pytest.raises(ValueError, match=r"num_frames .* at least 2"):
        draw([0], num_frames)


def test_a_batch_without_rows() -> None:
    with pytest.raises(ValueError, match="at least one utterance"):
        draw([], 10)


def test_a_single_masked_frame_has_no_negatives() -> None:
    with pytest.raises(ValueError, match=r"min_masked_frames \(1\) must be at least 2"):
        draw([0], 10, min_masked_frames=1)


def test_as_many_targets_as_int16_can_index() -> None:
    drawn = all_masked(3, 32_767, num_negatives=2)
    assert drawn.num_targets.tolist() == [32_767] * 3
    assert drawn.negatives.min() == 0
    assert drawn.negatives.max() == 32_766
    assert not (drawn.negatives == np.arange(32_767)[:, None]).any()
    with pytest.raises(ValueError, match=r"\(32768\) must be at most 32767.*lower max_duration_in_seconds"):
        all_masked(1, 32_768, num_negatives=2)


def fairseq_mask(
    rng: np.random.Generator, num_frames: int, mask_prob: float, mask_length: int
) -> npt.NDArray[np.bool_]:
    """One row of fairseq's ``compute_mask_indices`` (data/data_utils.py): static lengths, overlaps, 2 spans or more."""
    num_spans = max(2, int(mask_prob * num_frames / float(mask_length) + rng.random()))
    starts = rng.choice(num_frames - mask_length, num_spans, replace=False)
    mask = np.zeros(num_frames, dtype=np.bool_)
    mask[(starts[:, None] + np.arange(mask_length)).ravel()] = True
    return mask


@pytest.mark.parametrize("num_frames", [97, 499])
def test_masks_are_distributed_as_those_of_fairseq(num_frames: int) -> None:
    # The one difference: fairseq never masks the last frame, so it is given one frame more, and that is cut off.
    num_rows = 4000
    rng = np.random.default_rng(0)
    ours = draw(range(num_rows), num_frames).mask
    theirs = np.stack([fairseq_mask(rng, num_frames + 1, 0.65 * num_frames / (num_frames + 1), 10) for _ in ours])
    assert not theirs[:, -1].any()
    for measure in (masked_frames, masked_runs):
        pooled = np.concatenate([measure(ours), measure(theirs)])
        inner = np.unique(np.quantile(pooled, np.arange(1, 12) / 12))  # about twelve bins of equal weight
        bins = [np.bincount(np.searchsorted(inner, measure(x)), minlength=len(inner) + 1) for x in (ours, theirs)]
        table = np.array(bins)[:, np.sum(bins, axis=0) > 0]
        assert_fits(table, np.broadcast_to(table.mean(axis=0), table.shape), degrees=table.shape[1] - 1)
    assert np.abs(ours.mean(axis=0) - theirs[:, :-1].mean(axis=0)).max() < 5 * np.sqrt(0.5 / num_rows)  # each frame


def masked_frames(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return masks.sum(axis=1, dtype=np.int64)  # type: ignore[no-any-return]


def masked_runs(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return masked_frames(np.diff(masks, axis=1, prepend=False) & masks)


@pytest.mark.parametrize("num_frames", [100, 499, 780])
def test_masked_share_is_that_of_the_paper(num_frames: int) -> None:
    # Section 4.2: p = 0.065 per frame and spans of 10 mask about 49 % of the frames.
    assert draw(range(1000), num_frames).mask.mean() == pytest.approx(0.49, abs=0.015)


def test_number_of_spans_is_rounded_at_random() -> None:
    # 0.05 * 85 = 4.25: four spans of one frame each in three quarters of the draws, five in the others.
    num_spans = draw(range(8000), 85, 0.05, 1).num_targets
    assert_fits(np.bincount(num_spans), [1e-9] * 4 + [6000, 2000], degrees=1)


def test_every_set_of_starts_is_as_likely() -> None:
    mask = draw(range(15_000), 6, 2 / 6, 1).mask  # 2 of 6 frames: 15 sets
    assert (mask.sum(axis=1) == 2).all()
    sets = np.bincount(mask @ 2 ** np.arange(6))
    assert_fits(sets[sets > 0], np.full(15, 1000), degrees=14)


def test_starts_are_uniform() -> None:
    num_rows, num_frames, num_spans = 4000, 200, 20
    hits = draw(range(num_rows), num_frames, num_spans / num_frames, 1).mask.sum(axis=0)
    assert hits.sum() == num_rows * num_spans
    # Drawn without replacement: the variance of hits is less than their mean.
    shrink = (num_frames - 1) / (num_frames - num_spans)
    mean = num_rows * num_spans / num_frames
    assert_fits(mean + (hits - mean) * np.sqrt(shrink), np.full(num_frames, mean), degrees=num_frames - 1)


def test_targets_come_in_random_order() -> None:
    frames = all_masked(4000, 30, num_negatives=1).target_frames
    for slot in range(30):
        assert_fits(np.bincount(frames[:, slot], minlength=30), np.full(30, 4000 / 30), degrees=29)
    apart = (frames[:, 1] - frames[:, 0]) % 30  # neighbours on the ring are any two frames
    assert_fits(np.bincount(apart, minlength=30)[1:], np.full(29, 4000 / 29), degrees=28)


def test_negatives_are_uniform_over_the_others() -> None:
    negatives = negative_frames(all_masked(3000, 50, num_negatives=4))  # [3000, 50, 4]
    for frame in range(50):
        counts = np.bincount(negatives[:, frame].ravel(), minlength=50)
        assert counts[frame] == 0
        assert_fits(np.delete(counts, frame), np.full(49, 3000 * 4 / 49), degrees=48)


def test_each_frame_serves_as_often_as_any_other() -> None:
    drawn = draw(range(20), 200, num_negatives=7)
    for row, count in enumerate(drawn.num_targets):
        served = np.bincount(drawn.negatives[row, :count].ravel(), minlength=count)
        assert served.tolist() == [7] * count


def test_negatives_of_a_frame_and_of_other_frames_are_independent() -> None:
    """But for what the docstring says: no two frames have the same k-th negative."""
    num_rows, num_frames, num_negatives = 8000, 5, 3
    negatives = negative_frames(all_masked(num_rows, num_frames, num_negatives))
    places = itertools.product(range(num_frames), range(num_negatives))
    for (frame, one), (other_frame, other) in itertools.combinations(places, 2):
        pairs = negatives[:, frame, one] * num_frames + negatives[:, other_frame, other]
        counts = np.bincount(pairs, minlength=num_frames**2).reshape(num_frames, num_frames)
        assert not counts[frame].any() and not counts[:, other_frame].any()
        if frame == other_frame:
            counts = np.delete(np.delete(counts, frame, axis=0), frame, axis=1)
            assert_fits(counts, np.full((4, 4), num_rows / 16), degrees=15)
        elif one == other:
            assert not counts.diagonal().any()
