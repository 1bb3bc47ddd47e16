"""Adam's state is read by parameter, bit by bit as the engine had it, whatever cut it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.convert.errors import ConversionError
from trainer.convert.training_state import read_training_state

NUM_UPDATES = 2


def test_moments_of_every_layout(any_zero_run: Any) -> None:
    state = read_training_state(any_zero_run.step_folder, engine="deepspeed", world_size=2)
    assert {weight.name for weight in state.weights} == set(any_zero_run.expected)
    expected = load_file(any_zero_run.folder / "moments.safetensors")
    found = {f"{key}/{name}": weight for key, of in state.moments.of.items() for name, weight in of.items()}
    assert set(found) == set(expected)
    for name, weight in found.items():
        assert weight.shape == tuple(expected[name].shape)
        assert torch.equal(weight.read(), expected[name]), name
    assert state.moments.num_updates == NUM_UPDATES
    assert [group["weight_decay"] for group in state.moments.groups] == [0.01, 0.0]


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_another_optimizer_is_refused(zero_run: Callable[[str], Any], name: str) -> None:
    run = zero_run(name)
    path = run.step_folder / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    saved = torch.load(path, weights_only=False)
    inner = saved["optimizer_state_dict"]
    for entry in inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))["state"].values():
        del entry["exp_avg_sq"]
    torch.save(saved, path)
    with pytest.raises(ConversionError, match=r"zero_pp_rank_1.*group 0 has no exp_avg_sq"):
        read_training_state(run.step_folder, engine="deepspeed", world_size=2)


def _save_plain(folder: Path, *, named: bool) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """A model of which one parameter has had no gradient, saved as `Engine.save` does."""
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "unused": torch.nn.Linear(2, 1)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(NUM_UPDATES):
        model["used"](torch.ones(1, 3)).sum().backward()
        optimizer.step()
    names = {"names": [name for name, _ in model.named_parameters()]} if named else {}
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save({**optimizer.state_dict(), **names}, folder / "optimizer.pt")
    return model, optimizer


def test_plain_state(tmp_path: Path) -> None:
    model, optimizer = _save_plain(tmp_path, named=True)
    state = read_training_state(tmp_path, engine="plain", world_size=1)
    assert state.moments.num_updates == NUM_UPDATES
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            expected = optimizer.state[parameter].get(key, torch.zeros_like(parameter))
            assert torch.equal(state.moments.of[key][name].read(), expected)


def test_plain_state_without_names_tells_the_way(tmp_path: Path) -> None:
    _save_plain(tmp_path, named=False)
    with pytest.raises(ConversionError, match="resume it once with plain PyTorch"):
        read_training_state(tmp_path, engine="plain", world_size=1)
