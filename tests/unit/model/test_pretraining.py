"""The model: initialisation, LayerDrop, gradient checkpointing, frozen parts."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

from trainer.data.collate import Batch, MaskSettings, collate
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.model.optim import build_optimizer
from trainer.model.pretraining import LossTerms, PretrainingModel, build_model
from trainer.model.sizes import SIZES


def _model(seed: int = 0, **changes: Any) -> PretrainingModel:
    config = Wav2Vec2Config(**{**SIZES["demo"], **changes})
    return build_model(config, seed=seed, feature_penalty_weight=0.0, feature_grad_mult=1.0)


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(8_000).astype(np.float32) for _ in range(2)]
    return collate(waveforms, [0, 1], 0, 0, WAV2VEC2_GEOMETRY, MaskSettings(0.5, 5, 20))


def _terms(model: PretrainingModel, batch: Batch, dropped: tuple[int, ...] = ()) -> LossTerms:
    torch.manual_seed(7)
    terms: LossTerms = model(*batch[:5], gumbel_temperature=1.0, dropped_layers=dropped)
    return terms


def test_same_seed_same_weights() -> None:
    first, second, other = _model(), _model(), _model(seed=1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.project_hid.weight, other.project_hid.weight)


def test_positional_convolution_is_initialised_as_in_fairseq() -> None:
    config = Wav2Vec2Config(**{**SIZES["demo"], "num_conv_pos_embeddings": 128})
    model = build_model(config, seed=0)
    conv = model.backbone.encoder.pos_conv_embed.conv
    assert conv.weight.std().item() == pytest.approx(math.sqrt(4 / (128 * 128)), rel=0.02)
    stock = Wav2Vec2ForPreTraining(config).wav2vec2.encoder.pos_conv_embed.conv
    assert stock.weight.std().item() != pytest.approx(math.sqrt(4 / (128 * 128)), rel=0.1)  # why we do it ourselves


def test_only_the_loss_carries_a_graph(batch: Batch) -> None:
    terms = _terms(_model().train(), batch)
    assert [term.requires_grad for term in terms] == [True] + [False] * (len(terms) - 1)
    assert terms.num_targets.item() == batch.num_targets


class _Through(torch.nn.Module):
    """A layer that does nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


def test_dropped_layers_are_skipped_and_get_zero_gradients(batch: Batch) -> None:
    model = _model().train()
    full, dropped = _terms(model, batch), _terms(model, batch, dropped=(1,))
    assert full.loss.item() != dropped.loss.item()
    dropped.loss.backward()
    for name, parameter in model.backbone.encoder.layers.named_parameters():
        assert parameter.grad is not None, "None instead of zeros would let ranks reduce different parameters"
        assert bool(parameter.grad.any()) != name.startswith("1.") or "k_proj.bias" in name, name
    without_layer = _model().train()
    without_layer.backbone.encoder.layers[1] = _Through()
    assert _terms(without_layer, batch).loss.item() == dropped.loss.item()


def test_layer_drop_of_the_config_is_not_drawn_by_transformers(batch: Batch) -> None:
    model = _model(layerdrop=0.9).train()
    assert _terms(model, batch).loss.item() == _terms(_model().train(), batch).loss.item()
    assert model.config.layerdrop == 0.9


@pytest.mark.parametrize("dropped", [(), (0,)])
def test_gradient_checkpointing_changes_nothing(batch: Batch, dropped: tuple[int, ...]) -> None:
    plain, checkpointed = _model().train(), _model().train()
    checkpointed.checkpoint_activations()
    _terms(plain, batch, dropped).loss.backward()
    _terms(checkpointed, batch, dropped).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_bfloat16_model_takes_fp32_audio(batch: Batch) -> None:
    terms = _terms(_model().bfloat16().train(), batch)
    assert terms.loss.dtype == torch.float32 and torch.isfinite(terms.loss)


def test_overfits_one_batch(batch: Batch) -> None:
    model = _model().train()
    optimizer = build_optimizer(model, learning_rate=3e-3, betas=(0.9, 0.98), epsilon=1e-6, weight_decay=0.01)
    first = _terms(model, batch).contrastive_loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        terms = _terms(model, batch)
        (terms.loss / terms.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert _terms(model, batch).contrastive_loss.item() < 0.8 * first


def test_weight_decay_spares_vectors() -> None:
    optimizer = build_optimizer(_model(), learning_rate=1.0, betas=(0.9, 0.98), epsilon=1e-6, weight_decay=0.01)
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.01 and spared["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in spared["params"])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_frozen_front_end_gets_no_gradient_and_no_optimizer(batch: Batch, checkpointed: bool) -> None:
    model = _model().train()
    model.freeze_feature_encoder()
    if checkpointed:
        model.checkpoint_activations()
    front_end = {id(p) for p in model.backbone.feature_extractor.parameters()}
    optimizer = build_optimizer(model, learning_rate=1.0, betas=(0.9, 0.98), epsilon=1e-6, weight_decay=0.01)
    assert not front_end & {id(p) for group in optimizer.param_groups for p in group["params"]}
    _terms(model, batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in front_end), name


def test_frozen_features_are_not_penalised(batch: Batch) -> None:
    model = build_model(Wav2Vec2Config(**SIZES["demo"]), seed=0, feature_penalty_weight=10.0)
    model.freeze_feature_encoder()
    terms = _terms(model, batch)
    expected = terms.contrastive_loss + model.config.diversity_loss_weight * terms.diversity_loss
    torch.testing.assert_close(terms.loss.detach(), expected)
    assert terms.feature_penalty > 0  # still told
