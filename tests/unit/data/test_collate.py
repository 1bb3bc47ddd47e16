import numpy as np
import torch

from trainer.data.collate import Batch, MaskSettings, collate
from trainer.data.frames import WAV2VEC2_GEOMETRY

SETTINGS = MaskSettings(mask_prob=0.65, mask_length=10, num_negatives=7)


def batch_of(utterances: list[int], epoch: int = 3, seed: int = 5, num_samples: int = 32_000) -> Batch:
    waveforms = [np.random.default_rng(u).standard_normal(num_samples).astype(np.float32) for u in utterances]
    return collate(waveforms, utterances, epoch, seed, WAV2VEC2_GEOMETRY, SETTINGS)


def test_shapes_and_types() -> None:
    batch = batch_of([4, 8, 15])
    num_frames = WAV2VEC2_GEOMETRY.num_frames(32_000)
    most = int(batch.mask.sum(dim=1).max())
    expected = {
        "input_values": ((3, 32_000), torch.float32),
        "mask": ((3, num_frames), torch.bool),
        "target_frames": ((3, most), torch.int64),
        "target_valid": ((3, most), torch.bool),
        "negatives": ((3, most, 7), torch.int16),
    }
    assert {name: (tuple(getattr(batch, name).shape), getattr(batch, name).dtype) for name in expected} == expected
    assert batch.skipped == ()
    np.testing.assert_array_equal(
        batch.input_values[1].numpy(), np.random.default_rng(8).standard_normal(32_000).astype(np.float32)
    )


def test_targets_are_the_masked_frames() -> None:
    batch = batch_of(list(range(16)))
    assert batch.num_targets == int(batch.mask.sum()) == int(batch.target_valid.sum())
    assert len(set(batch.mask.sum(dim=1).tolist())) > 1  # some rows are padded
    for row in range(16):
        frames = batch.mask[row].nonzero().squeeze(1)
        valid = batch.target_valid[row]
        assert torch.equal(batch.target_frames[row][valid].sort().values, frames)
        assert torch.equal(valid, torch.arange(len(valid)) < len(frames))
        assert not batch.target_frames[row][~valid].any()
        assert not batch.negatives[row][~valid].any()
        negatives = batch.negatives[row][valid]
        assert negatives.max() < len(frames)
        assert not (negatives == torch.arange(len(frames))[:, None]).any()


def test_masks_do_not_depend_on_the_rest_of_the_batch() -> None:
    together, alone = batch_of([1, 2, 3]), batch_of([2])
    num_targets = alone.num_targets
    assert torch.equal(together.mask[1], alone.mask[0])
    assert torch.equal(together.target_frames[1, :num_targets], alone.target_frames[0])
    assert torch.equal(together.negatives[1, :num_targets], alone.negatives[0])


def test_masks_depend_on_seed_epoch_and_utterance() -> None:
    masks = [batch_of([1]).mask, batch_of([2]).mask, batch_of([1], epoch=4).mask, batch_of([1], seed=6).mask]
    assert len({mask.numpy().tobytes() for mask in masks}) == 4


def test_shortest_waveform() -> None:
    batch = batch_of([0, 1], num_samples=WAV2VEC2_GEOMETRY.min_samples(2))
    assert batch.num_targets == 4
    assert batch.negatives[0, :, 0].tolist() == [1, 0]


LENGTHS = [32_000, 30_500, 16_000, 32_000]


def padded(multiple_of: int = 1) -> Batch:
    waveforms = [np.random.default_rng(u).standard_normal(n).astype(np.float32) for u, n in enumerate(LENGTHS)]
    return collate(waveforms, range(4), 3, 5, WAV2VEC2_GEOMETRY, SETTINGS, multiple_of=multiple_of)


def test_padding_is_zero_and_its_length_is_told() -> None:
    batch = padded()
    assert batch.num_samples is not None and batch.num_samples.tolist() == LENGTHS
    assert batch.input_values.shape == (4, 32_000)
    for row, length in zip(batch.input_values, LENGTHS, strict=True):
        assert row[:length].count_nonzero() == length
        assert not row[length:].any()


def test_padded_frames_are_neither_masked_nor_targets_nor_negatives() -> None:
    batch = padded()
    for row, length in enumerate(LENGTHS):
        num_frames = WAV2VEC2_GEOMETRY.num_frames(length)
        count = int(batch.target_valid[row].sum())
        assert not batch.mask[row, num_frames:].any()
        assert batch.target_frames[row].max() < num_frames
        assert batch.negatives[row].max() < count == int(batch.mask[row].sum())
        assert not batch.negatives[row, count:].any()
    assert batch.num_targets == int(batch.mask.sum())


def test_padding_changes_neither_masks_nor_negatives() -> None:
    together = padded()
    for row, length in enumerate(LENGTHS):
        alone = batch_of([row], num_samples=length)
        num_targets, num_frames = alone.num_targets, alone.mask.shape[1]
        assert torch.equal(together.mask[row, :num_frames], alone.mask[0])
        assert torch.equal(together.target_frames[row, :num_targets], alone.target_frames[0])
        assert torch.equal(together.negatives[row, :num_targets], alone.negatives[0])


def test_padding_to_a_multiple() -> None:
    batch = padded(multiple_of=10_000)
    assert batch.input_values.shape == (4, 40_000)
    assert batch.mask.shape == (4, WAV2VEC2_GEOMETRY.num_frames(40_000))
    assert torch.equal(batch.mask[:, : padded().mask.shape[1]], padded().mask)


def test_the_crops_of_an_utterance_have_masks_of_their_own() -> None:
    waveforms = [np.zeros(32_000, np.float32)] * 3
    batch = collate(waveforms, [7, 7, 7], 3, 5, WAV2VEC2_GEOMETRY, SETTINGS, takes=[0, 1, 2])
    assert len({mask.numpy().tobytes() for mask in batch.mask}) == 3
    assert torch.equal(batch.mask[0], batch_of([7]).mask[0])
