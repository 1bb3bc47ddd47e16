"""Learning rate and temperature are pure functions of the step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.arguments import LR_SCHEDULER_TYPES
from trainer.model.schedules import gumbel_temperature, learning_rate


def _rate(step: int, kind: str = "linear", warmup: int = 10, total: int = 110) -> float:
    return learning_rate(step, peak=2.0, num_warmup_steps=warmup, max_train_steps=total, kind=kind)


def test_linear_rises_to_the_peak_and_falls_to_zero() -> None:
    rates = [_rate(step) for step in range(111)]
    assert rates[0] == pytest.approx(0.2)  # the first update is not wasted on a rate of zero
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[109] == pytest.approx(0.02) and rates[110] == 0.0


def test_other_schedules_agree_with_transformers_after_the_warmup() -> None:
    assert _rate(60, "cosine") == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert _rate(60, "constant_with_warmup") == 2.0 and _rate(4, "constant_with_warmup") == 1.0
    assert _rate(0, "constant") == 2.0
    assert _rate(110, "polynomial") == pytest.approx(1e-7)


@given(
    step=st.integers(0, 10_000),
    warmup=st.integers(0, 500),
    length=st.integers(1, 5_000),
    kind=st.sampled_from(LR_SCHEDULER_TYPES),
)
def test_rate_stays_between_zero_and_the_peak(step: int, warmup: int, length: int, kind: str) -> None:
    rate = _rate(step, kind, warmup, warmup + length)
    assert 0.0 <= rate <= 2.0


def test_temperature_decays_to_its_minimum() -> None:
    values = [gumbel_temperature(step, maximum=2.0, minimum=0.5, decay=0.9) for step in range(50)]
    assert values[0] == 2.0 and values[2] == pytest.approx(2.0 * 0.81)
    assert values[-1] == 0.5 and values == sorted(values, reverse=True)
