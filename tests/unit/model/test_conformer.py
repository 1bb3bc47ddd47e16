"""The conformer behaves as the other family does, and what its batch norms add."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2ConformerConfig

from trainer.data.collate import Batch, MaskSettings, collate
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.model.batch_norm import running_statistics
from trainer.model.optim import build_optimizer
from trainer.model.pretraining import LossTerms, PretrainingModel, build_model
from trainer.model.sizes import SIZES

_CONFIG: dict[str, Any] = {
    **SIZES["demo"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "conv_depthwise_kernel_size": 5,
    "conformer_conv_dropout": 0.0,
}


def _model(**changes: Any) -> PretrainingModel:
    model = build_model(Wav2Vec2ConformerConfig(**{**_CONFIG, **changes}), seed=0)
    model.train()
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(8_000).astype(np.float32) for _ in range(2)]
    return collate(waveforms, [0, 1], 0, 0, WAV2VEC2_GEOMETRY, MaskSettings(0.5, 5, 20))


def _terms(model: PretrainingModel, batch: Batch, dropped: tuple[int, ...] = ()) -> LossTerms:
    torch.manual_seed(7)
    terms: LossTerms = model(*batch[:5], gumbel_temperature=1.0, dropped_layers=dropped)
    return terms


@pytest.mark.parametrize("position", ["relative", "rotary", None])
def test_all_that_asks_for_a_gradient_gets_one(batch: Batch, position: str | None) -> None:
    """A parameter without one would stop DistributedDataParallel and be decayed by ZeRO."""
    model = _model(position_embeddings_type=position)
    _terms(model, batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != ("pos_conv_embed" in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_dropped_layers_are_skipped_and_get_zero_gradients(batch: Batch) -> None:
    model = _model(layerdrop=0.9)
    full, dropped = _terms(model, batch), _terms(model, batch, dropped=(1,))
    assert full.loss.item() == _terms(_model(), batch).loss.item()  # the config's own draw is off
    assert full.loss.item() != dropped.loss.item()
    dropped.loss.backward()
    assert not any(bool(p.grad.any()) for p in model.backbone.encoder.layers[1].parameters())


@pytest.mark.parametrize("dropped", [(), (0,)])
def test_gradient_checkpointing_changes_neither_gradients_nor_running_statistics(
    batch: Batch, dropped: tuple[int, ...]
) -> None:
    plain, checkpointed = _model(), _model()
    checkpointed.checkpoint_activations()
    for _ in range(2):
        _terms(plain, batch, dropped).loss.backward()
        _terms(checkpointed, batch, dropped).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, b), c in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(b, c), name


def test_running_statistics_are_means_and_variances_of_all_layers(batch: Batch) -> None:
    model = _model()
    assert len(running_statistics(model)) == 2 * 2
    before = [statistic.clone() for statistic in running_statistics(model)]
    _terms(model, batch)
    assert all(not torch.equal(a, b) for a, b in zip(before, running_statistics(model), strict=True))
    model.train(False)
    expected = _terms(model, batch).loss.item()
    running_statistics(model)[0].mul_(2.0)  # the tensors themselves, not copies
    assert _terms(model, batch).loss.item() != expected


def test_overfits_one_batch(batch: Batch) -> None:
    model = _model()
    optimizer = build_optimizer(model, learning_rate=3e-3, betas=(0.9, 0.98), epsilon=1e-6, weight_decay=0.01)
    first = _terms(model, batch).contrastive_loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        terms = _terms(model, batch)
        (terms.loss / terms.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert _terms(model, batch).contrastive_loss.item() < 0.8 * first


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_bfloat16_model_takes_fp32_audio_and_keeps_its_statistics_in_fp32(batch: Batch, position: str) -> None:
    model = _model(position_embeddings_type=position)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.bfloat16()  # as DeepSpeed does; in ZeRO-3 it casts the parameters only
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    terms = _terms(model, batch)
    terms.loss.backward()
    assert terms.loss.dtype == torch.float32 and torch.isfinite(terms.loss)
    assert {statistic.dtype for statistic in running_statistics(model)} == {torch.float32}
