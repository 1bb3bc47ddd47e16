import dataclasses
import itertools
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from trainer.data.audio import decode, normalise
from trainer.data.batching import (
    Batching,
    BatchSpec,
    Cursor,
    Limits,
    Take,
    shard_validation,
    validation_batches,
    windows,
)
from trainer.data.collate import Batch, MaskSettings
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.data.index import AudioIndex, DataError, build_index
from trainer.data.loader import UtteranceDataset, Window, training_windows, validation_loader
from trainer.data.sampling import takes_by_length

WriteAudio = Callable[..., Path]
SETTINGS = MaskSettings(mask_prob=0.65, mask_length=10, num_negatives=5)
START = Cursor(0, 0)
LIMITS = Limits(max_batch_samples=80_000, max_batch_size=4, max_samples=24_000)


@pytest.fixture
def index(tmp_path: Path, corpus: Path) -> AudioIndex:
    return build_index(str(corpus), str(tmp_path / "cache"), progress=False)[0]


def dataset_of(index: AudioIndex, random_crop: bool = True) -> UtteranceDataset:
    return UtteranceDataset(index, WAV2VEC2_GEOMETRY, SETTINGS, seed=1, random_crop=random_crop)


def batching_of(index: AudioIndex, no_crop: bool = False) -> Batching:
    """As long as 1.5 s, which the longer half exceeds."""
    takes = takes_by_length(index.num_samples, LIMITS.max_length)
    return Batching(index.num_samples, dataclasses.replace(LIMITS, no_crop=no_crop), 1, takes)


def first_windows(
    index: AudioIndex,
    num_windows: int,
    cursor: Cursor = START,
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 3,
    num_workers: int = 0,
    no_crop: bool = False,
) -> list[Window]:
    stream = training_windows(
        dataset_of(index), batching_of(index, no_crop), cursor, rank, world_size, accumulation_steps, num_workers, False
    )
    return list(itertools.islice(stream, num_windows))


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [value for value in batch if isinstance(value, torch.Tensor)]


def same(one: Batch, other: Batch) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return (one.num_targets, one.skipped) == (other.num_targets, other.skipped) and all(
        torch.equal(left, right) for left, right in pairs
    )


def same_windows(one: list[Window], other: list[Window]) -> bool:
    return [window.next_cursor for window in one] == [window.next_cursor for window in other] and all(
        same(x, y)
        for left, right in zip(one, other, strict=True)
        for x, y in zip(left.batches, right.batches, strict=True)
    )


def test_crops_come_from_seed_epoch_and_utterance(index: AudioIndex) -> None:
    dataset = dataset_of(index)
    together, alone = dataset[BatchSpec(2, (3, 7, 5), 9_000)], dataset[BatchSpec(2, (7,), 9_000)]
    assert torch.equal(together.input_values[1], alone.input_values[0])
    assert torch.equal(together.mask[1], alone.mask[0])
    later = dataset[BatchSpec(3, (7,), 9_000)]
    assert not torch.equal(later.input_values, alone.input_values)


def test_a_selection_of_the_index_keeps_crops_and_masks(index: AudioIndex) -> None:
    whole, part = dataset_of(index), dataset_of(index.take(np.array([11, 7])))
    assert same(whole[BatchSpec(0, (7, 11), 9_000)], part[BatchSpec(0, (1, 0), 9_000)])


def test_random_crops_reach_both_ends(index: AudioIndex) -> None:
    full = normalise(decode(index.path(0), 0, 9_600))
    assert index.num_samples[0] == 9_600
    starts = set()
    for epoch in range(60):
        crop = dataset_of(index)[BatchSpec(epoch, (0,), 9_597)].input_values[0].numpy()
        starts.add(min(range(4), key=lambda start: float(np.abs(full[start : start + 9_597] - crop).max())))
    assert starts == {0, 1, 2, 3}


def test_crops_of_one_utterance_lie_in_equal_shares_of_it(index: AudioIndex) -> None:
    row = int(np.argmax(index.num_samples))  # 2.5 s
    whole = decode(index.path(row), 0, int(index.num_samples[row]))
    places = np.lib.stride_tricks.sliding_window_view(whole, 8_000)[:, :20]  # enough to tell them apart
    sums, squares = (np.concatenate([[0], np.cumsum(whole.astype(float) ** power)]) for power in (1, 2))
    means, means_of_squares = ((total[8_000:] - total[:-8_000]) / 8_000 for total in (sums, squares))
    normalised = (places - means[:, None]) / np.sqrt(means_of_squares - means**2)[:, None]
    for epoch in range(5):
        takes = tuple(Take(number, 5) for number in range(5))
        batch = dataset_of(index)[BatchSpec(epoch, (row,) * 5, 8_000, takes)]
        starts = [int(np.abs(normalised - crop[:20]).max(axis=1).argmin()) for crop in batch.input_values.numpy()]
        assert [start * 5 // len(places) for start in starts] == [0, 1, 2, 3, 4]
        assert not torch.equal(batch.mask[0], batch.mask[1])


def test_more_crops_than_places_for_them(index: AudioIndex) -> None:
    takes = tuple(Take(number, 3) for number in range(3))
    batch = dataset_of(index)[BatchSpec(0, (0, 0, 0), int(index.num_samples[0]), takes)]
    assert torch.equal(batch.input_values[0], batch.input_values[2])
    assert not torch.equal(batch.mask[0], batch.mask[2])


def test_without_crops_utterances_come_whole(index: AudioIndex) -> None:
    batch = dataset_of(index)[BatchSpec(0, (5, 4, 0), 17_000)]
    assert batch.num_samples is not None
    assert batch.num_samples.tolist() == np.minimum(index.num_samples[[5, 4, 0]], 17_000).tolist()
    assert len(set(batch.num_samples.tolist())) > 1
    for number, row in enumerate((5, 4, 0)):
        alone = dataset_of(index)[BatchSpec(0, (row,), int(batch.num_samples[number]))]
        assert torch.equal(batch.input_values[number, : batch.num_samples[number]], alone.input_values[0])


def test_validation_takes_the_middle(index: AudioIndex) -> None:
    batch = dataset_of(index, random_crop=False)[BatchSpec(0, (0,), 9_000)]
    np.testing.assert_array_equal(batch.input_values[0].numpy(), normalise(decode(index.path(0), 300, 9_000)))


def test_rows_that_fail_are_left_out(index: AudioIndex) -> None:
    Path(index.path(4)).write_text("spoilt")
    dataset = dataset_of(index)
    batch = dataset[BatchSpec(0, (3, 4, 5), 9_000)]
    assert [(entry.path, entry.reason) for entry in batch.skipped] == [(index.path(4), "unreadable")]
    assert same(batch._replace(skipped=()), dataset[BatchSpec(0, (3, 5), 9_000)])


def test_a_batch_of_failures_takes_the_next_row_that_is_long_enough(index: AudioIndex) -> None:
    by_length = np.argsort(index.num_samples)
    spoilt = [int(by_length[-1]), int(by_length[-2])]
    for row in spoilt:
        Path(index.path(row)).write_text("spoilt")
    dataset = dataset_of(index)
    num_samples = int(index.num_samples[by_length[-4]])
    batch = dataset[BatchSpec(0, tuple(spoilt), num_samples)]
    candidates = [row % len(index) for row in range(spoilt[0], spoilt[0] + len(index))]
    expected = next(row for row in candidates if row in by_length[-4:-2])
    assert same(batch._replace(skipped=()), dataset[BatchSpec(0, (expected,), num_samples)])
    assert {entry.path for entry in batch.skipped} == {index.path(row) for row in spoilt}


def test_a_silent_stretch_is_not_a_silent_file(tmp_path: Path, write_audio: WriteAudio) -> None:
    sound, rate = soundfile.read(write_audio("corpus/a.flac", 2))
    soundfile.write(tmp_path / "corpus/a.flac", np.concatenate([sound, np.zeros(20 * rate), sound]), rate)
    soundfile.write(tmp_path / "corpus/b.flac", np.zeros(24 * rate), rate)
    write_audio("corpus/c.flac", 3)
    index, _ = build_index(str(tmp_path / "corpus"), str(tmp_path / "cache"), progress=False)
    batch = dataset_of(index, random_crop=False)[BatchSpec(0, (0, 1, 2), 2 * rate)]
    assert [(Path(item.path).name, item.reason) for item in batch.skipped] == [
        ("a.flac", "silent in part"),
        ("b.flac", "silent"),
    ]


def test_the_longest_row_fails_and_no_other_is_as_long(index: AudioIndex) -> None:
    by_length = np.argsort(index.num_samples)
    spoilt, next_best = int(by_length[-1]), int(by_length[-2])
    Path(index.path(spoilt)).write_text("spoilt")
    dataset, num_samples = dataset_of(index), int(index.num_samples[spoilt])
    batch = dataset[BatchSpec(0, (spoilt,), num_samples)]
    assert same(batch._replace(skipped=()), dataset[BatchSpec(0, (next_best,), num_samples)])
    assert [entry.path for entry in batch.skipped] == [index.path(spoilt)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_decodes(index: AudioIndex, num_workers: int) -> None:
    for row in range(len(index)):
        Path(index.path(row)).write_text("spoilt")
    with pytest.raises(DataError) as error:
        first_windows(index, 1, num_workers=num_workers)
    assert str(error.value).startswith(f"dataset_name ({index.root}) must hold audio that can be decoded; ")
    assert str(error.value).endswith("(unreadable).")
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


def test_at_most_100_replacements(index: AudioIndex) -> None:
    for row in range(len(index)):
        Path(index.path(row)).write_text("spoilt")
    many = index.take(np.arange(300) % len(index))
    with pytest.raises(DataError, match="102 files in a row"):
        dataset_of(many)[BatchSpec(0, (0, 1), 9_000)]


def test_windows_follow_the_batching(index: AudioIndex) -> None:
    dataset, batching = dataset_of(index), batching_of(index)
    expected = itertools.islice(windows(batching, START, 1, 2, 3), 4)
    for window, spec in zip(first_windows(index, 4, rank=1, world_size=2), expected, strict=True):
        assert window.next_cursor == spec.next_cursor
        assert all(same(batch, dataset[one]) for batch, one in zip(window.batches, spec.specs, strict=True))


@pytest.mark.parametrize("no_crop", [False, True])
def test_workers_change_nothing(index: AudioIndex, no_crop: bool) -> None:
    alone = first_windows(index, 8, no_crop=no_crop)
    assert alone[-1].next_cursor.epoch > 0  # across the ends of epochs
    assert any(batch.num_samples is not None for window in alone for batch in window.batches) == no_crop
    assert same_windows(first_windows(index, 8, num_workers=1, no_crop=no_crop), alone)
    assert same_windows(first_windows(index, 8, num_workers=3, no_crop=no_crop), alone)


@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_resuming_goes_on_as_if_there_had_been_no_stop(index: AudioIndex, stop: int) -> None:
    straight = first_windows(index, 9)
    resumed = first_windows(index, 8 - stop, cursor=straight[stop].next_cursor)
    assert same_windows(resumed, straight[stop + 1 :])


def test_the_global_window_does_not_depend_on_how_it_is_split(index: AudioIndex) -> None:
    together = first_windows(index, 3, accumulation_steps=4)
    ranks = [first_windows(index, 3, rank=rank, world_size=2, accumulation_steps=2) for rank in range(2)]
    for number, window in enumerate(together):
        dealt = [ranks[position % 2][number].batches[position // 2] for position in range(4)]
        assert all(same(x, y) for x, y in zip(window.batches, dealt, strict=True))
        assert ranks[0][number].next_cursor == ranks[1][number].next_cursor == window.next_cursor


def test_the_global_generator_of_torch_is_left_alone(index: AudioIndex) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first_windows(index, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation(index: AudioIndex, num_workers: int) -> None:
    dataset = dataset_of(index, random_crop=False)
    batches = validation_batches(index.num_samples, LIMITS)
    world_size = next(size for size in (2, 3) if len(batches) % size)
    shard = shard_validation(batches, world_size - 1, world_size)
    loaded = list(validation_loader(dataset, shard, num_workers, pin_memory=False))
    assert [counts for _, counts in loaded] == [True] * (len(shard) - 1) + [False]
    assert all(same(batch, dataset[spec]) for (batch, _), (spec, _) in zip(loaded, shard, strict=True))


def test_long_windows_do_not_run_out_of_open_files(index: AudioIndex) -> None:
    (window,) = first_windows(index, 1, accumulation_steps=60, num_workers=1)
    assert len(window.batches) == 60
    assert not any(tensor.is_shared() for batch in window.batches for tensor in tensors(batch))


def test_the_dataset_pickles_small(index: AudioIndex) -> None:
    many = index.take(np.arange(20_000) % len(index))
    first = many.take(np.arange(10))
    assert len(pickle.dumps(dataset_of(many))) < 20_000 * 40
    assert len(pickle.dumps(dataset_of(first))) < 5_000
