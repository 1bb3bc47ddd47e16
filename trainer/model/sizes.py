"""Shipped model sizes as transformers configurations, and configurations from folders or the Hub."""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from transformers import Wav2Vec2Config, Wav2Vec2ConformerConfig

from trainer.errors import UserError
from trainer.layout import CHECKPOINTS_FOLDER, MANIFEST_FILE, STEP_PREFIX, TRAINER_STATE_FILE

ModelConfig: TypeAlias = Wav2Vec2Config | Wav2Vec2ConformerConfig

_ARCHITECTURES = {
    "wav2vec2": "Wav2Vec2ForPreTraining",
    "wav2vec2-conformer": "Wav2Vec2ConformerForPreTraining",
}
# Checkpoints fine-tuned for recognition come with 0.05 or so; demo, the lowest of those shipped, has 0.5.
_FEW_MASKS = 0.3

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

# Babu et al. 2021 (XLS-R, arXiv 2111.09296). Dropouts and the 1024 of quantizer and projections are those in the
# configurations of the released fairseq checkpoints xlsr2_960m_1000k.pt and xlsr2_2B_1000k.pt (dropout_input,
# dropout_features, final_dim). The smallest of the three, XLS-R 0.3B, has the shapes of `large`.
_XLSR: dict[str, Any] = {
    **_PAPER,
    "codevector_dim": 1024,
    "proj_codevector_dim": 1024,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.1,
    "feat_quantizer_dropout": 0.1,
    "layerdrop": 0.0,
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
    "xlsr_1b": {**_XLSR, "hidden_size": 1280, "intermediate_size": 5120},  # 965.5 M
    "xlsr_2b": {**_XLSR, "hidden_size": 1920, "intermediate_size": 7680},  # 2,162.9 M
    # 620 M. fairseq: examples/wav2vec/config/pretraining/wav2vec2_conformer_large_librivox.yaml, with the defaults of
    # fairseq/modules/conformer_layer.py (swish, kernel 31); the shapes of facebook/wav2vec2-conformer-rel-pos-large.
    "conformer_large": {
        **_PAPER,
        "model_type": "wav2vec2-conformer",
        "codevector_dim": 768,
        "proj_codevector_dim": 768,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "hidden_act": "swish",
        "position_embeddings_type": "relative",
        "conv_depthwise_kernel_size": 31,
        "feat_extract_norm": "layer",
        "conv_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "conformer_conv_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "feat_quantizer_dropout": 0.0,
        "layerdrop": 0.0,
    },
}


def load_model_config(
    name_or_path: str,
    *,
    cache_dir: str | None,
    mask_time_prob: float | None,
    mask_time_length: int | None,
    say: Callable[[str], None],
    field: str = "model_name_or_path",
) -> ModelConfig:
    """Configuration of a shipped size, a folder or a Hub id, with masks changed where asked. Raises `UserError`.

    `say` takes notes for the user; `field` is the flag that `name_or_path` comes from.
    """
    is_size = name_or_path in SIZES and field != "init_from"
    config = shipped_config(name_or_path) if is_size else read_config(name_or_path, cache_dir, field)
    if mask_time_prob is not None:
        config.mask_time_prob = mask_time_prob
    elif 0 < config.mask_time_prob < _FEW_MASKS:
        say(
            f"mask_time_prob is {config.mask_time_prob} in {name_or_path}, few masks to learn from; set "
            "--mask_time_prob (the paper's value is 0.65) unless this is meant."
        )
    if mask_time_length is not None:
        config.mask_time_length = mask_time_length
    if not config.mask_time_prob > 0:
        raise UserError(
            f"mask_time_prob ({config.mask_time_prob}) of {name_or_path} must be above 0, or there is nothing to "
            "predict; set --mask_time_prob (the paper's value is 0.65)."
        )
    _leave_out_fine_tuning(config, name_or_path, say)
    config.architectures = [_ARCHITECTURES[config.model_type]]
    return config


def shipped_config(size: str) -> ModelConfig:
    """Configuration of one of `SIZES`."""
    values = dict(SIZES[size])
    family = values.pop("model_type", "wav2vec2")
    return Wav2Vec2ConformerConfig(**values) if family == "wav2vec2-conformer" else Wav2Vec2Config(**values)


def _leave_out_fine_tuning(config: ModelConfig, name: str, say: Callable[[str], None]) -> None:
    """Set back what fine-tuning recipes leave in a configuration and pre-training has no use for."""
    if config.mask_feature_prob > 0:
        say(f"mask_feature_prob is {config.mask_feature_prob} in {name}; set to 0 here, where only time is masked.")
        config.mask_feature_prob = 0.0
    config.apply_spec_augment = True  # without it stock transformers would leave out the masks of the trained model
    config.add_adapter = False
    if getattr(config, "adapter_attn_dim", None) is not None:
        config.adapter_attn_dim = None


def read_config(name_or_path: str, cache_dir: str | None, field: str) -> ModelConfig:
    """The configuration in a folder or on the Hub, as it is; `field` is the flag to name. Raises `UserError`."""
    from transformers import AutoConfig

    _check_before_the_network(name_or_path, field)
    try:
        config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{field} ({name_or_path}) must be {_sizes_or(field)}a folder with a config.json, or a Hub id that can be "
            f"reached: {reason}"
        ) from error
    if not isinstance(config, ModelConfig) or config.model_type not in _ARCHITECTURES:
        raise UserError(
            f"{field} ({name_or_path}) is a {config.model_type} model; this program trains "
            f"{' and '.join(_ARCHITECTURES)}; name a model of one of these families."
        )
    return config


def _sizes_or(field: str) -> str:
    return "" if field == "init_from" else f"a shipped size ({', '.join(SIZES)}), "


def _check_before_the_network(name_or_path: str, field: str) -> None:
    """Refuse names that are no Hub ids and no folders either, without asking the Hub for them."""
    if field == "init_from":
        _check_model_folder(Path(name_or_path))
    if os.path.exists(name_or_path):
        return
    near = difflib.get_close_matches(name_or_path, SIZES, n=1)  # no Hub id without an owner looks like one
    if near and field == "init_from":
        raise UserError(
            f"init_from ({name_or_path}) must have weights, which shipped sizes do not; name a folder or a Hub id, or "
            "leave --init_from out to start fresh."
        )
    if near:
        raise UserError(f"{field} ({name_or_path}) is no shipped size; did you mean {near[0]}?")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path):
        raise UserError(f"{field} ({name_or_path}) does not exist; correct the path (a Hub id reads OWNER/NAME).")


def _check_model_folder(folder: Path) -> None:
    """Refuse files, and folders whose weights are in our own layouts."""
    if folder.is_file():
        raise UserError(f"init_from ({folder}) is a file; name the folder that holds it and its config.json.")
    traces = (TRAINER_STATE_FILE, MANIFEST_FILE, f"{STEP_PREFIX}*", f"{CHECKPOINTS_FOLDER}/{STEP_PREFIX}*")
    if any(True for trace in traces for _ in folder.glob(trace)):
        raise UserError(
            f"init_from ({folder}) is a run folder or a checkpoint of this program, not a model folder; convert it "
            f"with `python -m trainer convert {folder} OUT` and start from OUT, or continue that run with --resume."
        )
