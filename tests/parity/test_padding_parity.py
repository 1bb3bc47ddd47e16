"""Utterances of unlike lengths in one padded batch give the losses and gradients of each alone."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ConformerConfig

from trainer.data.collate import Batch, MaskSettings, collate
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.model.pretraining import LossTerms, PretrainingModel, build_model
from trainer.model.sizes import SIZES, ModelConfig

_CONFIG: dict[str, Any] = {
    **SIZES["demo"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "diversity_loss_weight": 0.0,  # the one term that is a statistic of the batch
}
_LENGTHS = [9_000, 12_345, 4_000, 12_345]
_FAMILIES: dict[str, ModelConfig] = {
    "base (group norm, layer norms last)": Wav2Vec2Config(
        **{**_CONFIG, "feat_extract_norm": "group", "do_stable_layer_norm": False}
    ),
    "large (layer norms first)": Wav2Vec2Config(
        **{**_CONFIG, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
    ),
    "conformer, relative": Wav2Vec2ConformerConfig(
        **_CONFIG, conv_depthwise_kernel_size=31, position_embeddings_type="relative"
    ),
    "conformer, rotary": Wav2Vec2ConformerConfig(
        **_CONFIG, conv_depthwise_kernel_size=31, position_embeddings_type="rotary"
    ),
}


def _batch(utterances: list[int], multiple_of: int = 1) -> Batch:
    waveforms = [
        np.random.default_rng(number).standard_normal(_LENGTHS[number]).astype(np.float32) for number in utterances
    ]
    return collate(
        waveforms, utterances, 0, 0, WAV2VEC2_GEOMETRY, MaskSettings(0.5, 5, 20), multiple_of=multiple_of
    )  # fmt: skip


def _sums(model: PretrainingModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, contrastive loss, penalty, right answers and targets; and the gradient of the loss."""
    terms: LossTerms = model(*batch[:5], num_samples=batch.num_samples)
    model.zero_grad()
    terms.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    values = (terms.loss, terms.contrastive_loss, terms.feature_penalty, terms.num_correct, terms.num_targets)
    return torch.stack([value.detach() for value in values]).double(), gradient


@pytest.mark.parametrize("multiple_of", [1, 1_000])
@pytest.mark.parametrize("family", _FAMILIES)
def test_padding_changes_nothing(family: str, multiple_of: int) -> None:
    model = build_model(_FAMILIES[family], seed=0, feature_penalty_weight=10.0)
    model.train(False)  # no dropout, no Gumbel noise; a conformer's batch norms take their running statistics
    together, gradient = _sums(model, _batch([0, 1, 2, 3], multiple_of))
    alone = [_sums(model, _batch([number])) for number in range(4)]
    torch.testing.assert_close(together, torch.stack([sums for sums, _ in alone]).sum(dim=0), rtol=1e-5, atol=0)
    expected = torch.stack([each for _, each in alone]).sum(dim=0)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("family", _FAMILIES)
def test_samples_past_the_end_are_not_looked_at(family: str) -> None:
    model = build_model(_FAMILIES[family], seed=0, feature_penalty_weight=10.0)
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.0
    model.train()  # a conformer's batch norms take the statistics of the batch

    def sums(batch: Batch) -> torch.Tensor:
        torch.manual_seed(0)
        return _sums(model, batch)[0]

    clean = _batch([0, 1, 2, 3])
    assert clean.num_samples is not None
    spoilt = clean.input_values.clone()
    for row, length in zip(spoilt, clean.num_samples.tolist(), strict=True):
        row[length:] = 5.0
    torch.testing.assert_close(sums(clean), sums(clean._replace(input_values=spoilt)), rtol=1e-6, atol=0)


def test_without_the_lengths_padding_shows() -> None:
    model = build_model(_FAMILIES["base (group norm, layer norms last)"], seed=0, feature_penalty_weight=10.0)
    model.train(False)
    batch = _batch([0, 1, 2, 3])
    told, not_told = _sums(model, batch)[0], _sums(model, batch._replace(num_samples=None))[0]
    difference = (told - not_told).abs() / told.abs()
    assert difference[1] > 1e-4  # contrastive loss; ten times what the test above allows
    assert difference[2] > 1e-2  # penalty
