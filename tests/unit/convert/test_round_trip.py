"""What was converted starts a run, whose checkpoint converts to the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from trainer.convert.conversion import convert
from trainer.convert.weights import same_bits
from trainer.layout import PLAIN_MODEL_FILE
from trainer.model.initial_weights import check_initial_weights, load_initial_weights
from trainer.model.sizes import read_config


@pytest.mark.parametrize("name", ["zero2", "zero3-offload-conformer"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_convert_init_from_convert(
    zero_run: Callable[[str], Any], seal: Callable[..., None], tmp_path: Path, name: str, dtype: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    convert(zero_run(name).folder, first, dtype=dtype)

    config = read_config(str(first), None, "init_from")
    check_initial_weights(str(first), config, cache_dir=None)
    notes: list[str] = []
    model = load_initial_weights(str(first), config, seed=7, cache_dir=None, allow_missing_head=False, say=notes.append)
    assert notes == []
    step_folder = tmp_path / "run" / "checkpoints" / "step-00000000"
    step_folder.mkdir(parents=True)
    save_file(model.state_dict(), step_folder / PLAIN_MODEL_FILE)
    for file in ("config.json", "preprocessor_config.json"):
        (step_folder / file).write_bytes((first / file).read_bytes())
    seal(step_folder, engine="plain", world_size=1, step=0)

    convert(tmp_path / "run", second, dtype=dtype)
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert before.keys() == after.keys()
    assert [key for key in before if not same_bits(before[key], after[key])] == []
    assert (first / "config.json").read_text() == (second / "config.json").read_text()
