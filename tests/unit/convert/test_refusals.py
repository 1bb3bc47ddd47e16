"""Checkpoints that must not be converted: one message that names the file, exit code 2, and nothing written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.cli import main

CopyRun = Callable[[str], Any]
SHARDS = ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt")
MODEL_STATES = {"zero2": "mp_rank_00_model_states.pt", "zero3": "zero_pp_rank_1_mp_rank_00_model_states.pt"}


class Payload:
    """Pickles as a call that makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def truncate(folder: Path, stage: str) -> None:
    os.truncate(folder / SHARDS[0], (folder / SHARDS[0]).stat().st_size // 2)


def truncate_model_states(folder: Path, stage: str) -> None:
    os.truncate(folder / MODEL_STATES[stage], 3000)


def empty(folder: Path, stage: str) -> None:
    (folder / SHARDS[1]).write_bytes(b"")


def swap(folder: Path, stage: str) -> None:
    for source, target in [(SHARDS[0], "aside"), (SHARDS[1], SHARDS[0]), ("aside", SHARDS[1])]:
        (folder / source).rename(folder / target)


def remove(folder: Path, stage: str) -> None:
    (folder / SHARDS[1]).unlink()


def remove_model_states(folder: Path, stage: str) -> None:
    (folder / MODEL_STATES[stage]).unlink()


def duplicate(folder: Path, stage: str) -> None:
    shutil.copy(folder / SHARDS[1], folder / f"bf16_{SHARDS[1]}")


def of_another_step(folder: Path, stage: str) -> None:
    def advance(state: dict[str, Any]) -> None:
        wrapped = state["optimizer_state_dict"]
        for moments in wrapped.get("base_optimizer_state", wrapped.get("optimizer_state_dict"))["state"].values():
            moments["step"] += 1

    rewrite(folder / SHARDS[1], advance)


def of_another_world(folder: Path, stage: str) -> None:
    for name in SHARDS:
        rewrite(folder / name, lambda state: state["optimizer_state_dict"].update(partition_count=4))


def of_another_layout(folder: Path, stage: str) -> None:
    for name in SHARDS:
        rewrite(folder / name, lambda state: state["optimizer_state_dict"].update(partition_count=[]))


def of_mixed_kinds(folder: Path, stage: str) -> None:
    for name in SHARDS:
        rewrite(folder / name, lambda state: state["optimizer_state_dict"].update(partition_count=[[1], "2"]))


def with_code(folder: Path, stage: str) -> None:
    rewrite(folder / SHARDS[1], lambda state: state.update(extra=Payload(folder / "ran")))


def model_states_with_code(folder: Path, stage: str) -> None:
    rewrite(folder / MODEL_STATES[stage], lambda state: state.update(extra=Payload(folder / "ran")))


DAMAGES: list[tuple[Callable[[Path, str], None], str]] = [
    (truncate, SHARDS[0]),
    (truncate_model_states, "_model_states.pt"),
    (empty, SHARDS[1]),
    (remove, f"{SHARDS[1]} is missing"),
    (remove_model_states, "_model_states.pt"),
    (duplicate, SHARDS[1]),
    (of_another_step, SHARDS[1]),
    (of_another_world, "world size 4"),
    (of_another_layout, "not laid out as DeepSpeed 0.19 saves"),
    (of_mixed_kinds, "not laid out as DeepSpeed 0.19 saves"),
    (with_code, f"{SHARDS[1]}: refers to posix.mkdir"),
    (model_states_with_code, "refers to posix.mkdir"),
]


def refused(words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a conversion into a folder that stays as empty as it was."""
    place.mkdir(exist_ok=True)
    capsys.readouterr()
    assert main(["convert", *words]) == 2
    assert list(place.iterdir()) == []
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_damaged_shards(
    zero_run: CopyRun, seal: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """Each under the manifest of the sound save, and under one that was made after the damage."""
    sound = zero_run(stage)
    for damage, named in DAMAGES:
        run = tmp_path / damage.__name__
        shutil.copytree(sound.folder, run)
        step_folder = run / "checkpoints" / sound.step_folder.name
        damage(step_folder / "deepspeed", stage)
        words = [str(run), str(tmp_path / "place" / "out")]
        if damage is not duplicate:  # a file more is not in the manifest; the shards themselves tell
            assert "manifest.json" in refused(words, tmp_path / "place", capsys), damage
        seal(step_folder)
        message = refused(words, tmp_path / "place", capsys)
        assert message.startswith("trainer: error: "), damage
        assert named in message, damage
        assert not (step_folder / "deepspeed" / "ran").exists()


def test_swapped_shards(
    zero_run: CopyRun, seal: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest tells, and where there is none, the places that ZeRO-2 notes in each shard."""
    for stage in ("zero2", "zero3"):
        run = zero_run(stage)
        swap(run.step_folder / "deepspeed", stage)
        words = [str(run.folder), str(tmp_path / "place" / "out")]
        message = refused(words, tmp_path / "place", capsys)
        assert "manifest.json" in message
        assert SHARDS[0] in message
        if stage == "zero2":
            seal(run.step_folder)
            assert f"{SHARDS[0]}: " in refused(words, tmp_path / "place", capsys)


def test_trainer_state_of_another_world_size(
    zero_run: CopyRun, seal: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for world_size, named in [(1, "rank 1 in a checkpoint of world_size (1)"), (3, "zero_pp_rank_2")]:
        run = zero_run("zero2")
        seal(run.step_folder, world_size=world_size)
        assert named in refused([str(run.folder), str(tmp_path / "place" / "out")], tmp_path / "place", capsys)
        shutil.rmtree(run.folder)
