"""The names and shapes that are worked out without transformers are those of its models."""

import json
from typing import Any

import pytest
import torch
import transformers

from trainer.convert.stock import state_dict_shapes
from trainer.model.sizes import SIZES

EXTRACTOR = {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WAV2VEC2_VARIANTS: list[dict[str, Any]] = [
    SIZES["demo"],
    SIZES["base"] | {"num_hidden_layers": 2},
    SIZES["large"] | {"num_hidden_layers": 2},
    SMALL | {"feat_extract_norm": "group", "conv_bias": True, "num_conv_pos_embeddings": 9},
    SMALL | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0},
    SMALL | {"mask_time_prob": 0.0, "mask_feature_prob": 0.1},
    SMALL | {"num_codevector_groups": 4, "codevector_dim": 64, "proj_codevector_dim": 24},
]
CONFORMER_VARIANTS: list[dict[str, Any]] = [
    SMALL | {"position_embeddings_type": kind, "conv_depthwise_kernel_size": 5} for kind in ("relative", "rotary", None)
]


def variants() -> list[tuple[str, dict[str, Any]]]:
    return [("Wav2Vec2", settings) for settings in WAV2VEC2_VARIANTS] + [
        ("Wav2Vec2Conformer", settings) for settings in CONFORMER_VARIANTS
    ]


def configuration(family: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration and what `config.json` holds of it."""
    config = getattr(transformers, f"{family}Config")(**settings)
    config.architectures = [f"{family}ForPreTraining"]
    return config, json.loads(config.to_json_string(use_diff=True))


@pytest.mark.parametrize(("family", "settings"), variants())
def test_same_as_the_stock_model(family: str, settings: dict[str, Any]) -> None:
    config, content = configuration(family, settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForPreTraining")(config)
    assert state_dict_shapes(content, EXTRACTOR) == {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_other_models_are_left_to_transformers() -> None:
    _, content = configuration("Wav2Vec2", SMALL)
    assert state_dict_shapes(content, EXTRACTOR) is not None
    changes: tuple[dict[str, Any], ...] = (
        {"architectures": ["Wav2Vec2ForCTC"]},
        {"architectures": None},
        {"model_type": "wav2vec2-bert"},
        {"add_adapter": True},
        {"adapter_attn_dim": 16},
        {"conv_dim": None},
        {"conv_dim": []},
        {"conv_kernel": [10]},
    )
    for change in changes:
        assert state_dict_shapes(content | change, EXTRACTOR) is None, change
    content.pop("conv_bias")
    assert state_dict_shapes(content, EXTRACTOR) is None
    assert state_dict_shapes(content, {}) is None
