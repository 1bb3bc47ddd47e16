import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batching import (
    Batching,
    BatchSpec,
    Cursor,
    Limits,
    Take,
    epoch_batches,
    shard_validation,
    validation_batches,
    windows,
)
from trainer.data.sampling import takes_by_length


def lognormal(num_rows: int) -> np.ndarray:
    seconds = np.random.default_rng(0).lognormal(np.log(7), 0.6, num_rows).clip(1, 60)
    return (seconds * 16_000).astype(np.int64)


def batching_of(num_samples: np.ndarray, seed: int = 0, max_batch_size: int = 64, no_crop: bool = False) -> Batching:
    return Batching(num_samples, Limits(87 * 16_000, max_batch_size, 20 * 16_000, no_crop), seed)


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=100),
    max_batch_samples=st.integers(1, 3000),
    max_batch_size=st.integers(1, 9),
    max_samples=st.integers(1, 1200),
    epoch=st.integers(0, 5),
)
def test_batches_keep_to_the_limits(
    lengths: list[int], max_batch_samples: int, max_batch_size: int, max_samples: int, epoch: int
) -> None:
    num_samples = np.array(lengths)
    limits = Limits(max_batch_samples, max_batch_size, max_samples)
    trained = list(epoch_batches(Batching(num_samples, limits, seed=1), epoch))
    validated = validation_batches(num_samples, limits)
    for batches, number in [(trained, epoch), (validated, 0)]:
        assert sorted(row for spec in batches for row in spec.rows) == list(range(len(lengths)))
        for spec in batches:
            assert spec.epoch == number
            assert 1 <= len(spec.rows) <= max_batch_size
            assert len(spec.rows) * spec.num_samples <= max_batch_samples
            assert spec.num_samples == min(*(lengths[row] for row in spec.rows), max_samples, max_batch_samples)


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=100),
    max_batch_samples=st.integers(7, 3000),
    max_batch_size=st.integers(1, 9),
    max_samples=st.integers(1, 1200),
    multiple_of=st.integers(1, 7),
    epoch=st.integers(0, 5),
)
def test_padded_batches_keep_to_the_limits(
    lengths: list[int], max_batch_samples: int, max_batch_size: int, max_samples: int, multiple_of: int, epoch: int
) -> None:
    num_samples = np.array(lengths)
    limits = Limits(max_batch_samples, max_batch_size, max_samples, no_crop=True, multiple_of=multiple_of)
    trained = list(epoch_batches(Batching(num_samples, limits, seed=1), epoch))
    for batches in (trained, validation_batches(num_samples, limits)):
        assert sorted(row for spec in batches for row in spec.rows) == list(range(len(lengths)))
        for spec in batches:
            kept = [min(lengths[row], max_samples, max_batch_samples // multiple_of * multiple_of) for row in spec.rows]
            assert spec.num_samples == max(kept)
            assert 1 <= len(kept) <= max_batch_size
            assert len(kept) * (-(-max(kept) // multiple_of) * multiple_of) <= max_batch_samples
            assert sum(kept) >= 0.95 * len(kept) * max(kept)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    max_samples=st.integers(50, 1200),
    no_crop=st.booleans(),
    seed=st.integers(0, 3),
)
def test_long_rows_are_taken_in_proportion(lengths: list[int], max_samples: int, no_crop: bool, seed: int) -> None:
    num_samples = np.array(lengths)
    limits = Limits(3000, 8, max_samples, no_crop)
    batching = Batching(num_samples, limits, seed, takes_by_length(num_samples, limits.max_length))
    num_epochs = 7
    taken = np.zeros(len(lengths))
    for epoch in range(num_epochs):
        of_epoch: dict[int, list[Take]] = {}
        for spec in epoch_batches(batching, epoch):
            for row, take in zip(spec.rows, spec.takes or [Take(0, 1)] * len(spec.rows), strict=True):
                of_epoch.setdefault(row, []).append(take)
        assert sorted(of_epoch) == list(range(len(lengths)))
        for row, takes in of_epoch.items():
            assert sorted(takes) == [Take(number, len(takes)) for number in range(len(takes))]
            taken[row] += len(takes)
    assert (np.abs(taken - num_epochs * np.maximum(num_samples / max_samples, 1)) < 1).all()


def test_stretches_of_many_rows_hold_each_once() -> None:
    for no_crop in (False, True):
        for num_rows in (4095, 4096, 4097, 8192, 10_000):
            batches = epoch_batches(batching_of(lognormal(num_rows), no_crop=no_crop), 0)
            assert np.array_equal(np.sort(batches.rows), np.arange(num_rows))
            assert batches.sizes.sum() == num_rows
            assert {row for spec in batches for row in spec.rows} == set(range(num_rows))


@pytest.mark.parametrize(("num_rows", "most"), [(300, 0.04), (5_000, 0.03), (30_000, 0.03)])
def test_little_is_padding(num_rows: int, most: float) -> None:
    num_samples = lognormal(num_rows)
    batches = epoch_batches(batching_of(num_samples, no_crop=True), 0)
    padded = sum(len(spec.rows) * spec.num_samples for spec in batches)
    assert padded <= np.minimum(num_samples, 20 * 16_000).sum() / (1 - most)
    assert padded >= 0.7 * 87 * 16_000 * len(batches)  # batches are full, but for those with rare lengths


def test_epochs_and_seeds_differ_but_are_repeatable() -> None:
    batching = batching_of(lognormal(500))
    first, again = epoch_batches(batching, 0), epoch_batches(batching, 0)
    assert list(first) == list(again)
    for other in (epoch_batches(batching, 1), epoch_batches(batching_of(lognormal(500), seed=1), 0)):
        shared = {frozenset(spec.rows) for spec in first} & {frozenset(spec.rows) for spec in other}
        assert len(shared) < 0.2 * len(first)


def test_batches_are_not_in_order_of_length() -> None:
    crops = [spec.num_samples for spec in epoch_batches(batching_of(lognormal(5000)), 0)]
    assert abs(np.corrcoef(crops, np.arange(len(crops)))[0, 1]) < 0.15


@pytest.mark.parametrize(("num_rows", "kept"), [(300, 0.94), (5_000, 0.97), (30_000, 0.975)])
def test_little_audio_is_lost(num_rows: int, kept: float) -> None:
    num_samples = lognormal(num_rows)
    batches = epoch_batches(batching_of(num_samples), 0)
    cropped = sum(len(spec.rows) * spec.num_samples for spec in batches)
    assert cropped >= kept * np.minimum(num_samples, 20 * 16_000).sum()
    assert cropped >= 0.8 * 87 * 16_000 * len(batches)  # batches are full


def test_a_few_odd_lengths_do_not_crop_the_others() -> None:
    batches = validation_batches(np.array([100, 99, 10, 9, 8]), Limits(1000, 8, 1000))
    assert batches == [BatchSpec(0, (0, 1), 99), BatchSpec(0, (2, 3, 4), 8)]


def test_a_million_rows() -> None:
    num_samples = lognormal(1_000_000)
    takes = takes_by_length(num_samples, 20 * 16_000)
    for batching in (batching_of(num_samples), dataclasses.replace(batching_of(num_samples), expected_takes=takes)):
        start = time.process_time()
        batches = epoch_batches(batching, 0)
        assert time.process_time() - start < 2  # 0.3 s
        parts = (batches.rows, batches.first, batches.sizes, batches.num_samples, batches.takes)
        assert sum(part.nbytes for part in parts if part is not None) < 30e6


def test_resuming_late_costs_no_more_than_early() -> None:
    batching = batching_of(lognormal(100_000))
    seconds = []
    for cursor in (Cursor(0, 0), Cursor(0, 9_000), Cursor(1_000_000, 9_000)):
        start = time.process_time()
        next(windows(batching, cursor, rank=0, world_size=8, accumulation_steps=4))
        seconds.append(time.process_time() - start)
    assert max(seconds) < 5 * min(seconds)


small = batching_of(lognormal(60), max_batch_size=4)


def stream(cursor: Cursor, num_batches: int) -> list[BatchSpec]:
    one_by_one = windows(small, cursor, rank=0, world_size=1, accumulation_steps=1)
    return [window.specs[0] for window in itertools.islice(one_by_one, num_batches)]


def test_the_stream_is_epoch_after_epoch() -> None:
    epochs = [epoch_batches(small, epoch) for epoch in range(3)]
    expected = list(itertools.chain.from_iterable(epochs))
    assert stream(Cursor(0, 0), len(expected)) == expected


@settings(deadline=None, max_examples=30)
@given(
    epoch=st.integers(0, 3),
    batch=st.integers(0, 40),
    world_size=st.integers(1, 5),
    accumulation_steps=st.integers(1, 30),
)
def test_windows_deal_out_the_stream(epoch: int, batch: int, world_size: int, accumulation_steps: int) -> None:
    cursor = Cursor(epoch, batch)
    product = world_size * accumulation_steps
    ranks = [windows(small, cursor, rank, world_size, accumulation_steps) for rank in range(world_size)]
    rounds = list(itertools.islice(zip(*ranks, strict=True), 3))
    dealt = [rank.specs[micro_batch] for ranks in rounds for micro_batch in range(accumulation_steps) for rank in ranks]
    assert dealt == stream(cursor, 3 * product)
    for ranks_of_round in rounds:
        assert len({window.next_cursor for window in ranks_of_round}) == 1
        assert all(len(window.specs) == accumulation_steps for window in ranks_of_round)


@settings(deadline=None, max_examples=30)
@given(stop=st.integers(0, 30), world_size=st.integers(1, 3), accumulation_steps=st.integers(1, 4))
def test_resuming_goes_on_as_if_there_had_been_no_stop(stop: int, world_size: int, accumulation_steps: int) -> None:
    rank = world_size - 1
    straight = list(itertools.islice(windows(small, Cursor(0, 0), rank, world_size, accumulation_steps), stop + 4))
    resumed = windows(small, straight[stop].next_cursor, rank, world_size, accumulation_steps)
    assert list(itertools.islice(resumed, 3)) == straight[stop + 1 :]


def test_a_cursor_at_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    end = Cursor(0, len(epoch_batches(small, 0)))
    assert stream(end, 50) == stream(Cursor(1, 0), 50)


def test_validation_is_fixed_and_longest_first() -> None:
    num_samples = lognormal(200)
    limits = Limits(87 * 16_000, 8, 20 * 16_000)
    batches = validation_batches(num_samples, limits)
    assert batches == validation_batches(num_samples, limits)
    assert [spec.num_samples for spec in batches] == sorted((spec.num_samples for spec in batches), reverse=True)


@pytest.mark.parametrize("num_batches", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_validation_counts_every_batch_once(num_batches: int, world_size: int) -> None:
    batches = [BatchSpec(0, (row,), 1) for row in range(num_batches)]
    shards = [shard_validation(batches, rank, world_size) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1
    assert sorted(spec for shard in shards for spec, counts in shard if counts) == batches
