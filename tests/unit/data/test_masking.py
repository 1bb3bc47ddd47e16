import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.masking import sample_negatives, span_mask, utterance_rng

numbers = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(st.tuples(numbers, numbers, numbers, numbers), st.tuples(numbers, numbers, numbers, numbers))
def test_generators_depend_on_all_four_numbers(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    def draw(key: tuple[int, ...]) -> list[int]:
        return [int(number) for number in utterance_rng(*key).integers(0, 2**63, size=2)]

    assert draw(one) == draw(one)
    assert (draw(one) == draw(other)) == (one == other)


def test_generator_is_the_same_on_every_platform() -> None:
    assert utterance_rng(1, 2, 3, 4).integers(0, 1000, size=6).tolist() == [257, 30, 257, 944, 377, 245]


@settings(deadline=None, max_examples=300)
@given(
    seed=numbers,
    num_frames=st.integers(2, 300),
    mask_prob=st.floats(0, 1),
    mask_length=st.integers(1, 400),
    min_masked_frames=st.integers(0, 5),
)
def test_masks_of_any_length(
    seed: int, num_frames: int, mask_prob: float, mask_length: int, min_masked_frames: int
) -> None:
    mask = span_mask(np.random.default_rng(seed), num_frames, mask_prob, mask_length, min_masked_frames)
    assert mask.shape == (num_frames,)
    assert mask.dtype == np.bool_
    assert mask.sum() >= min(max(min_masked_frames, 1), num_frames)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    assert (edges[1::2] - edges[::2]).min() >= min(mask_length, num_frames - 1)


@pytest.mark.parametrize("num_frames", [0, 1])
def test_too_few_frames(num_frames: int) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        span_mask(np.random.default_rng(0), num_frames, 0.65, 10)


@pytest.mark.parametrize("num_frames", [100, 499, 780])
def test_masked_share_is_that_of_the_paper(num_frames: int) -> None:
    # Section 4.2: p = 0.065 per frame and spans of 10 mask about 49 % of the frames.
    rng = np.random.default_rng(0)
    masks = np.stack([span_mask(rng, num_frames, 0.65, 10) for _ in range(1000)])
    assert masks.mean() == pytest.approx(0.49, abs=0.015)


def test_number_of_spans_is_rounded_at_random() -> None:
    # 0.5 * 90 / 10 = 4.5: four spans of one frame each in half of the draws, five in the other half.
    rng = np.random.default_rng(0)
    num_spans = np.array([span_mask(rng, 90, 0.05, 1).sum() for _ in range(2000)])
    assert set(num_spans.tolist()) == {4, 5}
    assert num_spans.mean() == pytest.approx(4.5, abs=0.05)


def test_starts_are_uniform_and_distinct() -> None:
    rng = np.random.default_rng(0)
    hits = np.sum([span_mask(rng, 20, 0.25, 1) for _ in range(8000)], axis=0)  # 5 of 20 frames: 2000 +- 39 each
    assert hits.sum() == 5 * 8000
    assert np.abs(hits - 2000).max() < 200


@settings(deadline=None)
@given(seed=numbers, num_masked=st.integers(2, 80), num_negatives=st.integers(1, 50))
def test_negatives_are_other_masked_frames(seed: int, num_masked: int, num_negatives: int) -> None:
    negatives = sample_negatives(np.random.default_rng(seed), num_masked, num_negatives)
    assert negatives.shape == (num_masked, num_negatives)
    assert negatives.dtype == np.int64
    assert negatives.min() >= 0
    assert negatives.max() < num_masked
    assert not (negatives == np.arange(num_masked)[:, None]).any()


def test_negatives_are_uniform_over_the_others() -> None:
    negatives = sample_negatives(np.random.default_rng(0), 5, 40_000)
    counts = np.stack([np.bincount(row, minlength=5) for row in negatives])
    expected = 10_000 * (1 - np.eye(5))  # +- 87
    assert np.abs(counts - expected).max() < 450


def test_a_single_masked_frame_has_no_negatives() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        sample_negatives(np.random.default_rng(0), 1, 10)
