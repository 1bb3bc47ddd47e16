"""Shipped sizes, and configurations from elsewhere: what is accepted, set back, noted and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HubertConfig, Wav2Vec2Config, Wav2Vec2ConformerConfig

from trainer.errors import UserError
from trainer.model.pretraining import model_class
from trainer.model.sizes import SIZES, ModelConfig, load_model_config


def _load(name: object, notes: list[str] | None = None, field: str = "model_name_or_path", **masks: Any) -> ModelConfig:
    said: list[str] = [] if notes is None else notes
    masks = {"mask_time_prob": None, "mask_time_length": None, **masks}
    return load_model_config(str(name), cache_dir=None, say=said.append, field=field, **masks)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("base", 95.04), ("large", 317.39), ("conformer_large", 620.51), ("xlsr_1b", 965.51), ("xlsr_2b", 2162.93)],
)
def test_published_sizes(size: str, millions: float) -> None:
    config = _load(size)
    with torch.device("meta"):
        model = model_class(config)(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_architectures_name_the_class_that_loads_the_converted_folder(size: str) -> None:
    family = "Wav2Vec2Conformer" if size.startswith("conformer") else "Wav2Vec2"
    assert _load(size).architectures == [f"{family}ForPreTraining"]


def test_both_families_are_read_from_folders(tmp_path: Path) -> None:
    for config in (Wav2Vec2Config(mask_time_prob=0.65), Wav2Vec2ConformerConfig(mask_time_prob=0.65)):
        config.save_pretrained(tmp_path)
        assert type(_load(tmp_path)) is type(config)


def test_the_configuration_of_a_published_xls_r_is_read_from_a_folder(tmp_path: Path) -> None:
    """The keys that facebook/wav2vec2-xls-r-1b has, with one layer; its masks are for fine-tuning."""
    published = {
        "architectures": ["Wav2Vec2ForPreTraining"], "model_type": "wav2vec2", "hidden_size": 1280,
        "intermediate_size": 5120, "num_hidden_layers": 1, "num_attention_heads": 16, "conv_bias": True,
        "do_stable_layer_norm": True, "feat_extract_norm": "layer", "codevector_dim": 1024,
        "proj_codevector_dim": 1024, "mask_time_prob": 0.075, "torch_dtype": "float32",
        "transformers_version": "4.12.0.dev0", "gradient_checkpointing": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    notes: list[str] = []
    config = _load(tmp_path, notes)
    assert "mask_time_prob is 0.075" in notes[0]
    ours = _load("xlsr_1b")
    ours.num_hidden_layers = 1
    with torch.device("meta"):
        there, here = (model_class(each)(each).state_dict() for each in (config, ours))
    assert {name: value.shape for name, value in there.items()} == {name: value.shape for name, value in here.items()}


def test_a_hub_id_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model_name_or_path \(facebook/wav2vec2-xls-r-1b\) .*Hub id that can be reached"
    ):
        load_model_config(
            "facebook/wav2vec2-xls-r-1b", cache_dir=str(tmp_path), mask_time_prob=None, mask_time_length=None, say=print
        )


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    HubertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a hubert model; this program trains wav2vec2 and wav2vec2-conformer"):
        _load(tmp_path)


def test_what_fine_tuning_leaves_behind_is_set_back_with_a_note(tmp_path: Path) -> None:
    left: dict[str, Any] = {
        "mask_time_prob": 0.05,
        "mask_feature_prob": 0.25,
        "apply_spec_augment": False,
        "add_adapter": True,
    }
    Wav2Vec2Config(**left, adapter_attn_dim=16, architectures=["Wav2Vec2ForCTC"]).save_pretrained(tmp_path)
    notes: list[str] = []
    config = _load(tmp_path, notes, "init_from")
    assert config.mask_time_prob == 0.05  # kept: few masks may be meant
    assert config.mask_feature_prob == 0.0 and config.apply_spec_augment
    assert not config.add_adapter and config.adapter_attn_dim is None
    assert config.architectures == ["Wav2Vec2ForPreTraining"]
    assert "mask_time_prob is 0.05" in notes[0] and "--mask_time_prob (the paper's value is 0.65)" in notes[0]
    assert "mask_feature_prob is 0.25" in notes[1] and len(notes) == 2
    _load(tmp_path, notes, mask_time_prob=0.05)
    assert len(notes) == 3  # nothing about a value that was asked for


def test_mistakes_are_the_users() -> None:
    with pytest.raises(UserError, match="no-such-model"):
        _load("no-such-model")
    with pytest.raises(UserError, match="mask_time_prob"):
        _load("demo", mask_time_prob=0.0)
    assert _load("demo", mask_time_prob=0.3).mask_time_prob == 0.3


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "runs/large/pretrained", "~/model", "a b"])
@pytest.mark.parametrize("field", ["init_from", "model_name_or_path", "config_name"])
def test_a_path_that_does_not_exist_is_refused_before_the_network(
    path: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    with pytest.raises(UserError, match=rf"{field} \({path}\) does not exist; correct the path"):
        _load(path, field=field)
