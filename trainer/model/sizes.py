"""Shipped model sizes as transformers configurations, and configurations from folders or the Hub."""

import difflib
import os
from typing import Any

from transformers import Wav2Vec2Config

from trainer.errors import UserError

# Baevski et al. 2020, section 4.1 and appendix B; transformers' names. Masks: spans of 10 frames, p = 0.065 per frame,
# which fairseq and transformers write as 0.065 x 10 = 0.65. Temperature 0.1, 100 negatives, diversity weight 0.1.
_PAPER: dict[str, Any] = {
    "mask_time_prob": 0.65,
    "mask_time_length": 10,
    "num_negatives": 100,
    "contrastive_logits_temperature": 0.1,
    "diversity_loss_weight": 0.1,
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 320,
}

SIZES: dict[str, dict[str, Any]] = {
    # 0.7 M parameters, for two CPU cores. Not published values: narrow, and masks half as long, so that it learns
    # something within minutes.
    "demo": {
        **_PAPER,
        "mask_time_prob": 0.5,
        "mask_time_length": 5,
        "num_codevectors_per_group": 64,
        "codevector_dim": 64,
        "proj_codevector_dim": 64,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "conv_dim": (48,) * 7,
        "num_conv_pos_embeddings": 32,
        "num_conv_pos_embedding_groups": 8,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "feat_quantizer_dropout": 0.0,
        "layerdrop": 0.0,
    },
    # 95 M. fairseq: examples/wav2vec/config/pretraining/wav2vec2_base_librispeech.yaml
    "base": {
        **_PAPER,
        "codevector_dim": 256,
        "proj_codevector_dim": 256,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "feat_extract_norm": "group",
        "do_stable_layer_norm": False,
        "conv_bias": False,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.1,
        "feat_quantizer_dropout": 0.1,
        "layerdrop": 0.05,
    },
    # 317 M. fairseq: examples/wav2vec/config/pretraining/wav2vec2_large_librivox.yaml
    "large": {
        **_PAPER,
        "codevector_dim": 768,
        "proj_codevector_dim": 768,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "feat_quantizer_dropout": 0.0,
        "layerdrop": 0.0,
    },
}


def load_model_config(
    name_or_path: str, *, cache_dir: str | None, mask_time_prob: float | None, mask_time_length: int | None
) -> Wav2Vec2Config:
    """Configuration of a shipped size, a folder or a Hub id, with masks changed where asked. Raises `UserError`."""
    shipped = SIZES.get(name_or_path)
    config = _load_config(name_or_path, cache_dir) if shipped is None else Wav2Vec2Config(**shipped)
    if mask_time_prob is not None:
        config.mask_time_prob = mask_time_prob
    if mask_time_length is not None:
        config.mask_time_length = mask_time_length
    if not config.mask_time_prob > 0:
        raise UserError(
            f"mask_time_prob ({config.mask_time_prob}) of {name_or_path} must be above 0, or there is nothing to "
            "predict; set --mask_time_prob (the paper's value is 0.65)."
        )
    if config.mask_feature_prob > 0:
        raise UserError(
            f"mask_feature_prob ({config.mask_feature_prob}) of {name_or_path} must be 0: pre-training here masks time "
            "only; set it to 0 in a copy of its config.json."
        )
    config.architectures = ["Wav2Vec2ForPreTraining"]
    return config


def _load_config(name_or_path: str, cache_dir: str | None) -> Wav2Vec2Config:
    from transformers import AutoConfig

    near = difflib.get_close_matches(name_or_path, SIZES, n=1)
    if near and not os.path.exists(name_or_path):  # no Hub id without an owner looks like this; do not ask the network
        raise UserError(f"model_name_or_path ({name_or_path}) is no shipped size; did you mean {near[0]}?")
    try:
        config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model_name_or_path ({name_or_path}) must be a shipped size ({', '.join(SIZES)}), a folder with a "
            f"config.json, or a Hub id that can be reached: {reason}"
        ) from error
    if not isinstance(config, Wav2Vec2Config) or config.model_type != "wav2vec2":
        raise UserError(
            f"model_name_or_path ({name_or_path}) is a {config.model_type} model; this program trains wav2vec2."
        )
    return config
