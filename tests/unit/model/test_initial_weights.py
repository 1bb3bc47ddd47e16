"""Starting from other models' weights: what is loaded, drawn fresh, noted and refused. Real models, no network."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ConformerForPreTraining,
    Wav2Vec2ConformerModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
)

from trainer.convert.conversion import convert
from trainer.errors import UserError
from trainer.model.batch_norm import running_statistics
from trainer.model.initial_weights import check_initial_weights, load_initial_weights
from trainer.model.pretraining import PretrainingModel, build_model
from trainer.model.sizes import ModelConfig, load_model_config
from trainer.run.manifest import describe_files

_TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 5,
    "codevector_dim": 16,
    "proj_codevector_dim": 8,
    "mask_time_prob": 0.65,
    "vocab_size": 7,
}
_HEAD = [
    *("project_hid.bias", "project_hid.weight", "project_q.bias", "project_q.weight"),
    *("quantizer.codevectors", "quantizer.weight_proj.bias", "quantizer.weight_proj.weight"),
]
FAMILIES: dict[str, tuple[Any, Any, Any, Any]] = {
    "wav2vec2": (Wav2Vec2Config(**_TINY), Wav2Vec2ForPreTraining, Wav2Vec2Model, Wav2Vec2ForCTC),
    "wav2vec2-conformer": (
        Wav2Vec2ConformerConfig(**_TINY, conv_depthwise_kernel_size=3),
        *(Wav2Vec2ConformerForPreTraining, Wav2Vec2ConformerModel, Wav2Vec2ConformerForCTC),
    ),
}
both_families = pytest.mark.parametrize("family", FAMILIES)


def _save(folder: Path, architecture: Any, config: Any, **how: Any) -> dict[str, Tensor]:
    torch.manual_seed(99)
    model = architecture(config)
    model.save_pretrained(folder, **how)
    return {name: value.clone() for name, value in model.state_dict().items()}


def _config(folder: Path) -> ModelConfig:
    return load_model_config(
        str(folder), cache_dir=None, mask_time_prob=None, mask_time_length=None, say=print, field="init_from"
    )


def _start(
    folder: Path,
    *,
    seed: int = 3,
    allow: bool = False,
    notes: list[str] | None = None,
    config: ModelConfig | None = None,
) -> PretrainingModel:
    config = config or _config(folder)
    check_initial_weights(str(folder), config, cache_dir=None)
    said: list[str] = [] if notes is None else notes
    return load_initial_weights(
        str(folder), config, seed=seed, cache_dir=None, allow_missing_head=allow, say=said.append,
        feature_penalty_weight=10.0, global_diversity=False,
    )  # fmt: skip


def _assert_same(model: PretrainingModel, expected: dict[str, Tensor], names: set[str] | None = None) -> None:
    state = model.state_dict()
    for name in state if names is None else names:
        assert torch.equal(state[name], expected[name]), name


def _rewrite(folder: Path, change: Any) -> None:
    """Change the dict of tensors in a saved folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@both_families
@pytest.mark.parametrize("how", ["safetensors", "shards", "bin", "old names", "float16 config"])
def test_a_whole_model_is_loaded_bit_by_bit(tmp_path: Path, family: str, how: str) -> None:
    config, for_pretraining, *_ = FAMILIES[family]
    saved = _save(tmp_path, for_pretraining, config, **({"max_shard_size": "20KB"} if how == "shards" else {}))
    path = tmp_path / "model.safetensors"
    if how == "shards":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    elif how == "bin":
        torch.save(load_file(path), tmp_path / "pytorch_model.bin")
        path.unlink()
    elif how == "old names":
        _rewrite(tmp_path, _use_old_names)
    elif how == "float16 config":
        values = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(values | {"dtype": "float16"}))
    notes: list[str] = []
    model = _start(tmp_path, notes=notes)
    _assert_same(model, saved)
    assert notes == []
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.training and model.feature_penalty_weight == 10.0 and model.global_diversity is False


def _use_old_names(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "parametrizations" in name]:
        old = name.replace("parametrizations.weight.original0", "weight_g")
        tensors[old.replace("parametrizations.weight.original1", "weight_v")] = tensors.pop(name)
    assert any(name.endswith("conv.weight_g") for name in tensors)


@both_families
def test_what_asks_for_a_gradient_is_as_in_a_fresh_model(tmp_path: Path, family: str) -> None:
    config, for_pretraining, *_ = FAMILIES[family]
    _save(tmp_path, for_pretraining, config)
    loaded, fresh = _start(tmp_path), build_model(config, seed=0)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in fresh.named_parameters()
    }
    for (name, ours), theirs in zip(loaded.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(ours, theirs), name  # also those that no file holds


@both_families
def test_a_converted_run_is_started_from_as_it_ended(tmp_path: Path, family: str) -> None:
    trained = build_model(FAMILIES[family][0], seed=5)
    trained.config.architectures = [FAMILIES[family][1].__name__]
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    with torch.no_grad():
        for tensor in (*trained.parameters(), *running_statistics(trained)):
            tensor.add_(torch.rand_like(tensor))
    save_file(trained.state_dict(), step / "model.safetensors", metadata={"format": "pt"})
    trained.config.save_pretrained(step)
    Wav2Vec2FeatureExtractor().save_pretrained(step)
    (step / "trainer_state.json").write_text('{"version": 1, "step": 2, "world_size": 1, "engine": "plain"}')
    (step / "manifest.json").write_text(json.dumps({"version": 1, "files": describe_files(step)}))
    convert(tmp_path / "run", tmp_path / "pretrained")
    model = _start(tmp_path / "pretrained")
    _assert_same(model, trained.state_dict())
    model.save_pretrained(tmp_path / "again")
    _assert_same(_start(tmp_path / "again"), trained.state_dict())


@both_families
@pytest.mark.parametrize("kind", ["bare", "ctc"])
def test_a_model_without_a_head_is_refused_or_gets_a_fresh_one(tmp_path: Path, family: str, kind: str) -> None:
    config, _, bare, ctc = FAMILIES[family]
    saved = _save(tmp_path, bare if kind == "bare" else ctc, config)
    with pytest.raises(UserError, match="--allow_missing_head") as caught:
        _start(tmp_path)
    assert all(name in str(caught.value) for name in _HEAD)
    notes: list[str] = []
    model = _start(tmp_path, allow=True, notes=notes)
    prefix = f"{model.base_model_prefix}."
    expected = {prefix + name if kind == "bare" else name: value for name, value in saved.items()}
    _assert_same(model, expected, {name for name in model.state_dict() if name.startswith(prefix)})
    fresh = build_model(config, seed=0)
    for name in _HEAD:
        value, reference = model.state_dict()[name], fresh.state_dict()[name]
        assert value.mean().item() == pytest.approx(reference.mean().item(), abs=0.4), name
        assert value.std().item() == pytest.approx(reference.std().item(), rel=0.5), name
        assert torch.equal(value, _start(tmp_path, allow=True).state_dict()[name])  # the same on every rank
    assert not torch.equal(model.project_q.weight, _start(tmp_path, allow=True, seed=4).project_q.weight)
    assert "quantizer.codevectors" in notes[0] and "started fresh" in notes[0]
    assert (len(notes) == 2 and "lm_head" in notes[1]) == (kind == "ctc")


@both_families
def test_one_missing_part_of_the_head_leaves_the_others_alone(tmp_path: Path, family: str) -> None:
    config, for_pretraining, *_ = FAMILIES[family]
    saved = _save(tmp_path, for_pretraining, config)
    name = f"{for_pretraining.base_model_prefix}.masked_spec_embed"
    _rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=r"head: \S+\.masked_spec_embed; pass"):
        _start(tmp_path)
    _assert_same(_start(tmp_path, allow=True), saved, set(saved) - {name})


def test_other_missing_weights_are_refused_by_name(tmp_path: Path) -> None:
    _save(tmp_path, Wav2Vec2ForPreTraining, FAMILIES["wav2vec2"][0])
    _rewrite(tmp_path, lambda tensors: tensors.pop("wav2vec2.encoder.layers.1.attention.k_proj.weight"))
    with pytest.raises(UserError, match=r"lacks weights.*layers\.1\.attention\.k_proj\.weight"):
        _start(tmp_path, allow=True)


def test_other_shapes_are_refused_by_name_with_both(tmp_path: Path) -> None:
    _save(tmp_path, Wav2Vec2ForPreTraining, FAMILIES["wav2vec2"][0])
    other = Wav2Vec2Config(**{**_TINY, "codevector_dim": 32})
    with pytest.raises(UserError, match=r"project_q\.weight \(\[\d+, \d+\] there, \[\d+, 32\] here\)") as caught:
        _start(tmp_path, config=other, allow=True)
    assert f"--model_name_or_path {tmp_path}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_size": 32}, r"this run: hidden_size \(16 there, 32 here\);"),
        ({"num_hidden_layers": 1}, r"num_hidden_layers \(2 there, 1 here\)"),
        ({"do_stable_layer_norm": True}, r"do_stable_layer_norm \(False there, True here\)"),
        ({"num_attention_heads": 4}, r"num_attention_heads \(2 there, 4 here\)"),
        ({"conv_stride": (4, 2)}, r"conv_stride"),
    ],
)
def test_weights_that_would_mean_something_else_are_refused(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    _save(tmp_path, Wav2Vec2ForPreTraining, FAMILIES["wav2vec2"][0])
    with pytest.raises(UserError, match=part):
        _start(tmp_path, config=Wav2Vec2Config(**{**_TINY, **changes}), allow=True)


def test_adapters_of_fine_tuning_are_left_out_with_a_note(tmp_path: Path) -> None:
    adapted = Wav2Vec2Config(**_TINY, do_stable_layer_norm=True, adapter_attn_dim=4, add_adapter=True)
    saved = _save(tmp_path, Wav2Vec2ForPreTraining, adapted)
    notes: list[str] = []
    model = _start(tmp_path, notes=notes)
    assert "adapter" in notes[-1] and "more" in notes[-1]
    _assert_same(model, saved)


def test_another_family_is_refused(tmp_path: Path) -> None:
    HubertModel(HubertConfig(**{k: v for k, v in _TINY.items() if "code" not in k})).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"init_from .* is a hubert model"):
        _config(tmp_path)
    conformer, for_pretraining, *_ = FAMILIES["wav2vec2-conformer"]
    _save(tmp_path / "conformer", for_pretraining, conformer)
    with pytest.raises(UserError, match="is a wav2vec2-conformer model, the configuration of this run is wav2vec2"):
        _start(tmp_path / "conformer", config=FAMILIES["wav2vec2"][0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    _save(tmp_path, Wav2Vec2ForPreTraining, FAMILIES["wav2vec2"][0])
    _rewrite(tmp_path, lambda tensors: tensors["project_q.bias"].fill_(value))
    with pytest.raises(UserError, match=r"not finite: project_q\.bias"):
        _start(tmp_path)


@pytest.mark.parametrize("inner", ["", "checkpoints", "checkpoints/step-00000002"])
def test_our_own_run_folders_are_refused_with_the_remedy(tmp_path: Path, inner: str) -> None:
    step = tmp_path / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    FAMILIES["wav2vec2"][0].save_pretrained(step)
    (step / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"python -m trainer convert \S+ OUT"):
        _config(tmp_path / inner)


def test_what_has_no_readable_weights_is_the_users_mistake(tmp_path: Path) -> None:
    FAMILIES["wav2vec2"][0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        _start(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match=r"readable weights: model\.safetensors: .*; copy it again"):
        _start(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="readable weights"):
        _start(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        _config(tmp_path / "pytorch_model.bin")
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        _config(tmp_path)
    with pytest.raises(UserError, match="must have weights, which shipped sizes do not"):
        _config(Path("large"))
