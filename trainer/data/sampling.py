"""How often an epoch takes each utterance: by its length, and by temperature sampling over languages and corpora.

An epoch holds as much audio as the corpus, however it is shared out.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_FIXED_POINT = 32
# Bits after the point in which takes are counted over the epochs; integers add up without error.
_FACTOR_STEP = 2.0**-16
# Factors of tags are rounded to this, as powers may differ in the last bit from one CPU to another.
_PHASE_STREAM = 2**32
# Beyond the epochs: seeds the generator of the phases.


def takes_by_length(num_samples: npt.NDArray[np.int64], max_length: int) -> npt.NDArray[np.float64]:
    """Crops of ``max_length`` samples that make up each row's length; one of a shorter row.

    Returns:
        Expected takes per epoch, shape [num_rows], at least 1.
    """
    return np.maximum(num_samples / max_length, 1.0)


def tag_factors(
    num_samples: npt.NDArray[np.int64],
    taken: npt.NDArray[np.float64],
    tags: npt.NDArray[np.integer],
    tag_sources: Sequence[int],
    alpha: float,
) -> npt.NDArray[np.float64]:
    """What to multiply the takes of each tag's rows with, for XLS-R's temperature sampling (arXiv:2111.09296).

    Language l of a corpus is drawn with probability p_l ~ (n_l / N)^alpha, where n_l are its hours and N those of the
    corpus; corpora are drawn in the same way.

    Args:
        num_samples: length of each row, [num_rows]: the hours n_l.
        taken: samples that an epoch would take of each row if every factor were 1, [num_rows].
        tags: tag of each row, 0 .. num_tags - 1, [num_rows].
        tag_sources: the corpus that each tag belongs to, 0 .. num_corpora - 1, length num_tags.
        alpha: 1 leaves the hours as they are, 0 makes languages equal.

    Returns:
        Factors, shape [num_tags], with which an epoch is as long as without. 1 for a tag without rows.
    """
    sources = np.asarray(tag_sources)
    hours = _sums(tags, num_samples, len(sources))
    by_source = _sums(sources, hours, 0)
    languages = _tempered(hours, alpha)
    in_source = _sums(sources, languages, 0)
    share = languages / np.where(in_source == 0, 1, in_source)[sources] * _tempered(by_source, alpha)[sources]
    share /= share.sum()
    realised = _sums(tags, taken, len(sources))
    factors = np.where(realised == 0, 1.0, share * taken.sum() / np.where(realised == 0, 1, realised))
    rounded: npt.NDArray[np.float64] = np.maximum(np.round(factors / _FACTOR_STEP), 1) * _FACTOR_STEP
    return rounded


def _sums(
    groups: npt.NDArray[np.integer], values: npt.NDArray[np.integer | np.floating], num_groups: int
) -> npt.NDArray[np.float64]:
    """Sum of the values of each group."""
    return np.bincount(groups, weights=values, minlength=num_groups).astype(np.float64)


def _tempered(hours: npt.NDArray[np.float64], alpha: float) -> npt.NDArray[np.float64]:
    """(n / N)^alpha, and 0 for what has no hours at all."""
    return np.where(hours > 0, (hours / hours.sum()) ** alpha, 0.0)


def num_takes(expected: npt.NDArray[np.float64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """How often an epoch takes each row.

    Over epochs 0 to E - 1 a row is taken ``E * expected`` times, rounded up or down: what is taken every third time
    comes in one epoch of three, and another third of such rows in the next. An epoch is a function of its number alone.

    Returns:
        Whole numbers, shape [num_rows]; 1 where 1 is expected.
    """
    fixed = np.round(expected * 2.0**_FIXED_POINT).astype(np.uint64)
    fraction = fixed & np.uint64(2**_FIXED_POINT - 1)
    rng = np.random.default_rng([seed, _PHASE_STREAM])
    phase = rng.integers(0, 2**_FIXED_POINT, len(expected), dtype=np.uint64)
    before, after = (fraction * np.uint64(passed) + phase for passed in (epoch, epoch + 1))
    point = np.uint64(_FIXED_POINT)
    counts: npt.NDArray[np.int64] = ((fixed >> point) + (after >> point) - (before >> point)).astype(np.int64)
    return counts
