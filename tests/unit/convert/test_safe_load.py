"""A checkpoint file cannot run code, and a damaged one is named."""

import os
from pathlib import Path

import pytest
import torch

from trainer.convert.errors import ConversionError
from trainer.convert.safe_load import STAND_INS, Ignored, safe_load


class Payload:
    """Pickles as a call: unpickling it the ordinary way creates the file `target`."""

    def __init__(self, target: Path, function: object) -> None:
        self.target = target
        self.function = function

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, (str(self.target),)


@pytest.mark.parametrize(("function", "name"), [(os.mkdir, "mkdir"), (eval, "eval"), (Path.touch, "pathlib")])
def test_pickled_code_is_refused_by_name_and_does_not_run(tmp_path: Path, function: object, name: str) -> None:
    target = tmp_path / "ran"
    torch.save({"optimizer_state_dict": Payload(target, function)}, tmp_path / "bad.pt")
    with pytest.raises(ConversionError, match=rf"bad\.pt: refers to \S*{name}.*nothing was run"):
        safe_load(tmp_path / "bad.pt")
    assert not target.exists()


class ByGetattr:
    """Pickles as `getattr("text", "upper")`, as Python 3.11.2 pickles enum members."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return getattr, ("text", "upper")


def test_getattr_is_let_through_and_looks_nothing_up(tmp_path: Path) -> None:
    torch.save({"zero_stage": ByGetattr()}, tmp_path / "states.pt")
    assert isinstance(safe_load(tmp_path / "states.pt")["zero_stage"], Ignored)


def test_payload_would_run_in_an_ordinary_load(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "ran", os.mkdir), tmp_path / "bad.pt")
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_files_of_deepspeed_need_no_other_globals(zero_root: Path) -> None:
    allowed = {name for _, name in STAND_INS}
    files = sorted(zero_root.rglob("*_states.pt"))
    found = {name for path in files for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)}
    assert found <= allowed
    assert {"deepspeed.utils.tensor_fragment.fragment_address", "deepspeed.runtime.zero.config.ZeroStageEnum"} <= found


def test_stand_ins_are_not_left_allowed(zero_root: Path) -> None:
    safe_load(next(zero_root.rglob("*_optim_states.pt")))
    assert not set(STAND_INS) & set(torch.serialization.get_safe_globals())


def test_tensors_are_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "mapped.pt"
    torch.save({"big": torch.zeros(1000)}, path)
    state = safe_load(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert state["big"].sum() == 0


def test_file_cut_short_is_named(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1000)}, tmp_path / "short.pt")
    os.truncate(tmp_path / "short.pt", 2000)
    with pytest.raises(ConversionError, match=r"short\.pt: not a readable torch file"):
        safe_load(tmp_path / "short.pt")


def test_missing_file_and_other_content_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"none\.pt: missing"):
        safe_load(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConversionError, match=r"list\.pt: holds a list"):
        safe_load(tmp_path / "list.pt")
