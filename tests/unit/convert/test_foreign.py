"""Checkpoints that another trainer saved with accelerate and DeepSpeed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from trainer.convert.conversion import convert
from trainer.convert.errors import ConversionError
from trainer.convert.foreign import find_foreign
from trainer.convert.weights import same_bits


@pytest.fixture
def saved(accelerate_root: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged, of what a ZeRO-2 run saved."""
    shutil.copytree(accelerate_root / "accelerate-zero2", tmp_path / "run")
    return tmp_path / "run"


def assert_converted(source: Path, out: Path, run: Path, **arguments: Any) -> None:
    report = convert(source, out, **arguments)
    assert (report.step, report.engine, report.verified) == (2, "deepspeed", True)
    found, expected = load_file(out / "model.safetensors"), load_file(run / "expected.safetensors")
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert transformers.AutoModelForPreTraining.from_pretrained(out).dtype == torch.float32


@pytest.mark.parametrize("name", ["accelerate-zero2", "accelerate-zero3"])
def test_every_folder_that_names_the_checkpoint_is_taken(accelerate_root: Path, tmp_path: Path, name: str) -> None:
    run = accelerate_root / name
    assert (run / "state" / "pytorch_model").is_dir()
    tag = (run / "bare" / "latest").read_text()
    for n, source in enumerate(["state", "state/pytorch_model", "bare", f"bare/{tag}"]):
        assert_converted(run / source, tmp_path / str(n), run, config_from=run / "pretrained")


def test_configuration_beside_the_shards_is_taken(saved: Path, tmp_path: Path) -> None:
    for path in (saved / "pretrained").iterdir():
        shutil.copy(path, saved / "state")
    assert_converted(saved / "state", tmp_path / "out", saved)


def test_missing_configuration_is_asked_for(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"config\.json: missing.*--config_from"):
        convert(saved / "state", tmp_path / "out")
    shutil.copy(saved / "pretrained" / "config.json", saved / "state")
    with pytest.raises(ConversionError, match=r"preprocessor_config\.json: missing.*--config_from"):
        convert(saved / "state", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configuration_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    path = saved / "pretrained" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(ConversionError, match=r"encoder\.layers\.1\.\S+ is missing.*config\.json does not describe"):
        convert(saved / "state", tmp_path / "out", config_from=saved / "pretrained")


def test_tags(saved: Path) -> None:
    bare = saved / "bare"
    tag = bare / (bare / "latest").read_text()
    shutil.copytree(tag, bare / "global_step9")
    assert find_foreign(bare) == tag
    (bare / "latest").write_text("global_step9")
    assert find_foreign(bare) == bare / "global_step9"
    (bare / "latest").write_text("../state/pytorch_model")
    with pytest.raises(ConversionError, match=r"latest: names '\.\./state/pytorch_model', which holds no"):
        find_foreign(bare)
    (bare / "latest").unlink()
    with pytest.raises(ConversionError, match=rf"holds the checkpoints {tag.name}, global_step9 and no"):
        find_foreign(bare)
    shutil.rmtree(tag)
    assert find_foreign(bare) == bare / "global_step9"
    assert find_foreign(saved / "pretrained") is None
    assert find_foreign(saved / "none") is None


def test_own_folders_are_not_taken_for_those_of_another_trainer(saved: Path) -> None:
    for name in ("step-00000002", ".unfinished-step-00000002", "superseded-step-00000002"):
        shutil.copytree(saved / "state", saved / name)
        assert find_foreign(saved / name) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_shard_is_known_from_the_others(saved: Path, tmp_path: Path, rank: int) -> None:
    next((saved / "state" / "pytorch_model").glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")).unlink()
    with pytest.raises(ConversionError, match=rf"zero_pp_rank_{rank}_mp_rank_00_optim_states\.pt is missing"):
        convert(saved / "state", tmp_path / "out", config_from=saved / "pretrained")


def test_shards_of_two_steps_and_no_model_states(saved: Path, tmp_path: Path) -> None:
    shards = saved / "state" / "pytorch_model"
    path = next(shards.glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt"))
    state = torch.load(path, weights_only=False)
    for moments in state["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        moments["step"] += 1
    torch.save(state, path)
    with pytest.raises(ConversionError, match=r"zero_pp_rank_1.*optimizer step 3, but .*zero_pp_rank_0.* has 2"):
        convert(saved / "state", tmp_path / "out", config_from=saved / "pretrained")
    (shards / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ConversionError, match=r"_model_states\.pt are missing"):
        convert(saved / "state", tmp_path / "out", config_from=saved / "pretrained")
    assert not (tmp_path / "out").exists()
