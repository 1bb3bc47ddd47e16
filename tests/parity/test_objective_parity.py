"""Our loss and gradients against stock transformers: same weights, same masks, same negatives, fp32."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForPreTraining,
    Wav2Vec2ForPreTraining,
)

from trainer.data.collate import Batch, MaskSettings, collate
from trainer.data.frames import FrameGeometry
from trainer.model.pretraining import LossTerms, PretrainingModel, build_model
from trainer.model.sizes import ModelConfig

Stock = Wav2Vec2ForPreTraining | Wav2Vec2ConformerForPreTraining

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_codevectors_per_group": 32,
    "codevector_dim": 16,
    "proj_codevector_dim": 12,
    "num_negatives": 20,
    "mask_time_prob": 0.65,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.0,
}
_STYLES: dict[str, dict[str, Any]] = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
_CONFORMER: dict[str, Any] = {"hidden_act": "swish", "conv_depthwise_kernel_size": 5, "conformer_conv_dropout": 0.0}
_CONFORMER_STYLES: dict[str, dict[str, Any]] = {
    "conformer_large": {"feat_extract_norm": "layer", "conv_bias": True, "position_embeddings_type": "relative"},
    "conformer_rotary": {"position_embeddings_type": "rotary"},
}


def _batch(config: ModelConfig, num_utterances: int = 3, num_samples: int = 16_000) -> Batch:
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(num_samples).astype(np.float32) for _ in range(num_utterances)]
    geometry = FrameGeometry(tuple(config.conv_kernel), tuple(config.conv_stride))
    masks = MaskSettings(config.mask_time_prob, config.mask_time_length, config.num_negatives)
    return collate(waveforms, range(num_utterances), 0, 0, geometry, masks)


def _run_ours(model: PretrainingModel, batch: Batch, temperature: float = 2.0) -> LossTerms:
    terms: LossTerms = model(*batch[:5], gumbel_temperature=temperature)
    return terms


def _run_stock(model: Stock, batch: Batch) -> Any:
    """The stock forward, told the same masks and negatives in its own terms: flat positions in (B x T)."""
    num_frames = batch.mask.shape[1]
    negatives = torch.zeros(*batch.mask.shape, batch.negatives.shape[-1], dtype=torch.long)
    for row in range(len(batch.mask)):
        count = int(batch.target_valid[row].sum())
        frames = batch.target_frames[row, :count]
        negatives[row, frames] = frames[batch.negatives[row, :count].long()] + row * num_frames
    return model(batch.input_values, mask_time_indices=batch.mask, sampled_negative_indices=negatives)


def _pair(style: str) -> tuple[PretrainingModel, Stock, Batch]:
    config: ModelConfig
    if style in _STYLES:
        config = Wav2Vec2Config(**_SMALL, **_STYLES[style])
        stock: Stock = Wav2Vec2ForPreTraining(config)
    else:
        config = Wav2Vec2ConformerConfig(**_SMALL, **_CONFORMER, **_CONFORMER_STYLES[style])
        stock = Wav2Vec2ConformerForPreTraining(config)
    ours = build_model(config, seed=1, feature_penalty_weight=0.0, feature_grad_mult=1.0)
    stock.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    return ours, stock, _batch(config)


def _assert_equal(ours: PretrainingModel, stock: Stock, terms: LossTerms, expected: Any) -> None:
    torch.testing.assert_close(terms.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.contrastive_loss, expected.contrastive_loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.diversity_loss, expected.diversity_loss.detach(), rtol=1e-5, atol=1e-5)
    terms.loss.backward()
    expected.loss.backward()
    wanted = dict(stock.named_parameters())
    norm = torch.stack([p.grad.double().norm() for p in wanted.values() if p.grad is not None]).norm()
    for name, parameter in ours.named_parameters():
        reference = wanted[name].grad
        ours_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        reference = torch.zeros_like(parameter) if reference is None else reference
        assert (ours_grad - reference).norm() <= 1e-5 * norm, name


@pytest.mark.parametrize("style", [*_STYLES, *_CONFORMER_STYLES])
def test_training_loss_and_gradients_equal_stock(style: str) -> None:
    ours, stock, batch = _pair(style)
    ours.train()
    stock.train()
    # stock draws Gumbel noise for every frame, ours for masked frames only: without noise both take the softmax's peak
    zero_noise = torch.nn.functional.gumbel_softmax
    try:
        torch.nn.functional.gumbel_softmax = _noiseless  # type: ignore[assignment]
        stock.set_gumbel_temperature(2)
        _assert_equal(ours, stock, _run_ours(ours, batch, 2.0), _run_stock(stock, batch))
    finally:
        torch.nn.functional.gumbel_softmax = zero_noise


def _noiseless(logits: torch.Tensor, tau: float = 1.0, hard: bool = False) -> torch.Tensor:
    soft = (logits / tau).softmax(-1)
    one_hot = torch.nn.functional.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return one_hot + (soft - soft.detach()) if hard else soft


@pytest.mark.parametrize("style", [*_STYLES, *_CONFORMER_STYLES])
def test_evaluation_loss_equals_stock(style: str) -> None:
    ours, stock, batch = _pair(style)
    ours.train(False)
    stock.train(False)
    with torch.no_grad():
        terms = _run_ours(ours, batch)
        torch.testing.assert_close(terms.contrastive_loss, _run_stock(stock, batch).contrastive_loss)


def test_feature_penalty_and_gradient_factor_follow_fairseq() -> None:
    config = Wav2Vec2Config(**_SMALL)
    batch = _batch(config)
    plain = build_model(config, seed=1, feature_penalty_weight=0.0, feature_grad_mult=1.0)
    scaled = build_model(config, seed=1, feature_penalty_weight=10.0, feature_grad_mult=0.1)
    plain.train(False)
    scaled.train(False)
    terms, with_penalty = _run_ours(plain, batch), _run_ours(scaled, batch)
    expected = terms.loss + 10.0 * terms.feature_penalty
    torch.testing.assert_close(with_penalty.loss, expected)
    squares = plain.backbone.feature_extractor(batch.input_values).pow(2).mean(dim=(1, 2))
    penalty_only = torch.autograd.grad(
        (squares * batch.target_valid.sum(dim=1)).sum(),
        list(plain.backbone.feature_extractor.parameters()),
    )
    terms.loss.backward()
    with_penalty.loss.backward()
    for (name, p), q, extra in zip(
        plain.backbone.feature_extractor.named_parameters(),
        scaled.backbone.feature_extractor.parameters(),
        penalty_only,
        strict=True,
    ):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(q.grad, 0.1 * (p.grad + 10.0 * extra), rtol=1e-3, atol=1e-3, msg=name)
