import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.sampling import num_takes, tag_factors, takes_by_length

HOURS = np.array([700.0, 200.0, 90.0, 10.0])


def rows_of(hours: np.ndarray, seconds: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and tags of as many rows of equal length as fill the hours."""
    counts = (hours * 360).astype(int) // (seconds // 10)
    return np.full(counts.sum(), seconds * 16_000), np.repeat(np.arange(len(hours)), counts)


@settings(deadline=None, max_examples=100)
@given(
    expected=st.lists(st.floats(2**-16, 50), min_size=1, max_size=40),
    first=st.integers(0, 1_000_000),
    num_epochs=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_takes_add_up_over_the_epochs(expected: list[float], first: int, num_epochs: int, seed: int) -> None:
    wanted = np.array(expected)
    counts = np.array([num_takes(wanted, seed, epoch) for epoch in range(first, first + num_epochs)])
    assert (np.abs(counts.sum(axis=0) - num_epochs * wanted) < 1.001).all()
    assert (counts >= np.floor(wanted)).all() and (counts <= np.floor(wanted) + 1).all()


def test_one_is_one_in_every_epoch() -> None:
    for epoch in (0, 1, 1000, 2**31):
        assert (num_takes(np.ones(1000), 0, epoch) == 1).all()


def test_rows_of_a_kind_take_turns() -> None:
    counts = np.array([num_takes(np.full(3000, 1 / 3), 0, epoch) for epoch in range(3)])
    assert (np.abs(counts.sum(axis=1) - 1000) < 100).all()
    assert not np.array_equal(num_takes(np.full(3000, 1 / 3), 1, 0), counts[0])  # another seed, other turns


def test_takes_by_length() -> None:
    assert takes_by_length(np.array([1, 100, 101, 250]), 100).tolist() == [1.0, 1.0, 1.01, 2.5]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_languages_get_their_share(alpha: float) -> None:
    num_samples, tags = rows_of(HOURS)
    factors = tag_factors(num_samples, num_samples.astype(float), tags, [0, 0, 0, 0], alpha)
    taken = HOURS * factors
    wanted = (HOURS / HOURS.sum()) ** alpha
    np.testing.assert_allclose(taken / taken.sum(), wanted / wanted.sum(), rtol=1e-4)
    assert taken.sum() == pytest.approx(HOURS.sum(), rel=1e-4)  # an epoch is as long as without
    if alpha == 1:
        assert (factors == 1).all()


def test_corpora_are_balanced_like_languages() -> None:
    num_samples, tags = rows_of(HOURS)
    factors = tag_factors(num_samples, num_samples.astype(float), tags, [0, 0, 1, 1], 0.5)
    taken = HOURS * factors
    corpora = np.sqrt([900.0, 100.0])
    assert taken[:2].sum() / taken[2:].sum() == pytest.approx(corpora[0] / corpora[1], rel=1e-4)
    assert taken[0] / taken[1] == pytest.approx(np.sqrt(700 / 200), rel=1e-4)
    assert taken[2] / taken[3] == pytest.approx(np.sqrt(90 / 10), rel=1e-4)


def test_tags_without_rows_are_left_out() -> None:
    num_samples, tags = rows_of(np.array([9.0, 0.0, 1.0]))
    factors = tag_factors(num_samples, num_samples.astype(float), tags, [0, 1, 0], 0.0)
    np.testing.assert_allclose(factors, [5 / 9, 1, 5], rtol=1e-4)


def test_a_share_of_what_is_taken() -> None:
    """Language 0 has long recordings of which one crop is taken: its hours decide its share, its crops the factor."""
    num_samples, tags = np.array([100] * 5 + [10] * 50), np.array([0] * 5 + [1] * 50)
    taken = np.full(55, 10.0)
    factors = tag_factors(num_samples, taken, tags, [0, 0], 1.0)
    np.testing.assert_allclose(factors, [5.5, 0.55], rtol=1e-4)
