"""Shards of a ZeRO checkpoint that do not belong together are refused, by name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.convert.errors import ConversionError
from trainer.convert.zero import read_zero

CopyRun = Callable[[str], Any]


def shards(run: Any) -> Path:
    folder: Path = run.step_folder / "deepspeed"
    return folder


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_missing_shard(zero_run: CopyRun, name: str) -> None:
    folder = shards(zero_run(name))
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ConversionError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt is missing"):
        read_zero(folder, world_size=2)


@pytest.mark.parametrize(
    ("name", "file"),
    [("zero2", "mp_rank_00_model_states.pt"), ("zero3", "zero_pp_rank_1_mp_rank_00_model_states.pt")],
)
def test_missing_model_states(zero_run: CopyRun, name: str, file: str) -> None:
    folder = shards(zero_run(name))
    (folder / file).unlink()
    with pytest.raises(ConversionError, match=f"{file}.*missing"):
        read_zero(folder, world_size=2)


def test_double_shard(zero_run: CopyRun) -> None:
    folder = shards(zero_run("zero2"))
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(folder / name, folder / f"bf16_{name}")
    with pytest.raises(ConversionError, match="rank 1 has a second file"):
        read_zero(folder, world_size=2)


def test_shard_beyond_the_world(zero_run: CopyRun) -> None:
    with pytest.raises(ConversionError, match=r"rank 1 in a checkpoint of world_size \(1\)"):
        read_zero(shards(zero_run("zero2")), world_size=1)


def test_shards_of_tensor_parallelism(zero_run: CopyRun) -> None:
    folder = shards(zero_run("zero2"))
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").rename(folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    with pytest.raises(ConversionError, match="tensor parallelism"):
        read_zero(folder, world_size=2)


def test_truncated_shard(zero_run: CopyRun) -> None:
    folder = shards(zero_run("zero3"))
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ConversionError, match=r"zero_pp_rank_0.*not a readable torch file"):
        read_zero(folder, world_size=2)


@pytest.mark.parametrize("name", ["zero1-frozen", "zero2", "zero3"])
def test_shard_of_another_world_size(zero_run: CopyRun, name: str) -> None:
    folder = shards(zero_run(name))
    rewrite(
        folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        lambda state: state["optimizer_state_dict"].update(partition_count=4),
    )
    with pytest.raises(ConversionError, match=r"zero_pp_rank_1.*world size 4, the checkpoint by one of 2"):
        read_zero(folder, world_size=2)


@pytest.mark.parametrize(("name", "key"), [("zero2", "base_optimizer_state"), ("zero3", "optimizer_state_dict")])
def test_shard_of_another_step(zero_run: CopyRun, name: str, key: str) -> None:
    def advance(state: dict[str, Any]) -> None:
        for moments in state["optimizer_state_dict"][key]["state"].values():
            moments["step"] += 1

    folder = shards(zero_run(name))
    rewrite(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt", advance)
    with pytest.raises(ConversionError, match=r"zero_pp_rank_1.*optimizer step 3, but .*zero_pp_rank_0.* has 2"):
        read_zero(folder, world_size=2)


def test_model_states_of_another_step(zero_run: CopyRun) -> None:
    folder = shards(zero_run("zero3"))
    rewrite(folder / "zero_pp_rank_1_mp_rank_00_model_states.pt", lambda state: state.update(global_steps=7))
    with pytest.raises(ConversionError, match=r"zero_pp_rank_1.*global_steps differs"):
        read_zero(folder, world_size=2)


@pytest.mark.parametrize("name", ["zero1-bf16-fp32-gradients", "zero2"])
def test_shard_copied_from_another_rank(zero_run: CopyRun, name: str) -> None:
    folder = shards(zero_run(name))
    first, second = sorted(folder.glob("*optim_states.pt"))
    shutil.copy(first, second)
    with pytest.raises(ConversionError, match=rf"{second.name}: \S+ lies elsewhere in this shard than rank 1"):
        read_zero(folder, world_size=2)


@pytest.mark.parametrize(("name", "key"), [("zero2", "single_partition_of_fp32_groups"), ("zero3", "fp32_flat_groups")])
def test_partition_of_another_size_or_type(zero_run: CopyRun, name: str, key: str) -> None:
    folder = shards(zero_run(name))
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def shorten(state: dict[str, Any]) -> None:
        state["optimizer_state_dict"][key][0] = state["optimizer_state_dict"][key][0].detach()[:-5]

    def to_bf16(state: dict[str, Any]) -> None:
        state["optimizer_state_dict"][key][0] = state["optimizer_state_dict"][key][0].detach().bfloat16()

    rewrite(path, shorten)
    with pytest.raises(ConversionError, match=r"elements where .* need"):
        read_zero(folder, world_size=2)
    rewrite(path, to_bf16)
    with pytest.raises(ConversionError, match=r"zero_pp_rank_1.*tensor of bfloat16"):
        read_zero(folder, world_size=2)


def test_unknown_layouts(zero_run: CopyRun) -> None:
    folder = shards(zero_run("zero2"))
    for rank in (0, 1):
        rewrite(
            folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            lambda state: state["optimizer_state_dict"].pop("single_partition_of_fp32_groups"),
        )
    with pytest.raises(ConversionError, match="only checkpoints of ZeRO-1, 2 and 3"):
        read_zero(folder, world_size=2)
    rewrite(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", lambda state: state.clear())
    with pytest.raises(ConversionError, match="has no optimizer_state_dict"):
        read_zero(folder, world_size=2)


def test_frozen_parameters_left_out_of_the_save(zero_run: CopyRun) -> None:
    folder = shards(zero_run("zero3-bf16-subgroups-frozen-tied"))
    for path in folder.glob("*model_states.pt"):
        rewrite(path, lambda state: state.update(frozen_param_shapes=None))
    with pytest.raises(ConversionError, match=r"no shard holds wav2vec2\.feature_extractor"):
        read_zero(folder, world_size=2)


def test_shares_of_two_types(zero_run: CopyRun) -> None:
    folder = shards(zero_run("zero3-bf16-subgroups-frozen-tied"))

    def widen(state: dict[str, Any]) -> None:
        shares = state["frozen_param_fragments"]
        shares.update({name: share.float() for name, share in shares.items()})

    rewrite(folder / "zero_pp_rank_1_mp_rank_00_model_states.pt", widen)
    with pytest.raises(ConversionError, match=r"has \d+ bytes where its shape needs \d+"):
        read_zero(folder, world_size=2)


@pytest.mark.parametrize(
    ("name", "file"),
    [("zero2", "mp_rank_00_model_states.pt"), ("zero3", "zero_pp_rank_0_mp_rank_00_model_states.pt")],
)
def test_shards_of_another_model(zero_run: CopyRun, name: str, file: str) -> None:
    folder = shards(zero_run(name))
    rewrite(folder / file, lambda state: state["module"].pop("project_hid.weight"))
    with pytest.raises(ConversionError, match=rf"{file}: does not list project_hid\.weight"):
        read_zero(folder, world_size=2)


def test_bf16_runs_give_the_master_weights(zero_root: Path) -> None:
    """The weights are those of the optimizer and not of the bf16 model: rounding them must change most of them."""
    folder = zero_root / "zero2-bf16-frozen" / "checkpoints" / "step-00000002" / "deepspeed"
    weights = {weight.name: weight.read() for weight in read_zero(folder, world_size=2)}
    trained = weights["wav2vec2.encoder.layers.0.attention.k_proj.weight"]
    assert (trained != trained.bfloat16().float()).float().mean() > 0.9
    frozen = weights["wav2vec2.feature_extractor.conv_layers.0.conv.weight"]
    assert torch.equal(frozen, frozen.bfloat16().float())
