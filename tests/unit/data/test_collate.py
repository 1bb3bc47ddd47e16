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
