"""Every shipped DeepSpeed configuration in the real program on two CPU ranks: the same losses, and state that lasts.

The first run with NVMe compiles DeepSpeed's extension async_io, which takes minutes; it is kept for later ones.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from safetensors.torch import load_file

from tests.integration.ranks import kill, metrics, start_ranks, wait
from trainer.cli import main
from trainer.run.ds_config import load_ds_config, shipped_configs

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parents[1] / "corpus"
START_LIMIT_SECONDS = 600
NVME = "zero3_nvme"
needs_async_io = pytest.mark.skipif(
    not AsyncIOBuilder().is_compatible(verbose=False), reason="libaio's headers or a C++ compiler are missing"
)

FLAGS = [
    "--config=demo", "--max_train_steps=3", "--num_warmup_steps=1", "--logging_steps=1", "--saving_steps=2",
    "--eval_steps=3", "--per_device_train_batch_size=2", "--max_batch_seconds=4", "--num_workers=0",
    f"--dataset_name={CORPUS / 'validation'}", "--global_diversity=false",
]  # fmt: skip


def _train(folder: Path, run: str, *flags: str, num_ranks: int = 2) -> Path:
    """Run to update 3; returns the run folder."""
    out, log = folder / run, folder / f"{run}.log"
    arguments = ["pretrain", *FLAGS, f"--output_dir={out}", f"--cache_dir={folder / 'cache'}", *flags]
    ranks = start_ranks(arguments, log, num_ranks)
    try:
        codes = wait(ranks, START_LIMIT_SECONDS)
    finally:
        kill(ranks)
    assert codes == [0] * num_ranks, log.read_text(errors="replace")[-4000:]
    return out


def _train_shipped(folder: Path, name: str) -> Path:
    nvme = folder / "nvme"
    nvme.mkdir(exist_ok=True)
    return _train(folder, name, f"--deepspeed={name}", *([f"--nvme_path={nvme}"] if name == NVME else []))


def _copy_before_the_last_update(run: Path, to: Path) -> None:
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step-00000003")


def _assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3, 3]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "contrastive_loss", "accuracy", "code_perplexity", "num_targets"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
        if ours["split"] == "train":
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def _weights(run: Path, out: Path) -> dict[str, torch.Tensor]:
    assert main(["convert", str(run), str(out)]) == 0
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def zero2(folder: Path) -> Path:
    return _train_shipped(folder, "zero2")


@pytest.fixture(scope="module")
def nvme(folder: Path) -> Path:
    return _train_shipped(folder, NVME)


@pytest.mark.parametrize("name", sorted(set(shipped_configs()) - {"zero2", NVME}))
def test_a_stage_has_the_losses_of_zero2(name: str, folder: Path, zero2: Path) -> None:
    _assert_close(metrics(_train_shipped(folder, name)), metrics(zero2))


@needs_async_io
def test_nvme_has_the_losses_of_zero2_and_leaves_no_files(folder: Path, zero2: Path, nvme: Path) -> None:
    _assert_close(metrics(nvme), metrics(zero2))
    swapped = list((nvme / "checkpoints" / "step-00000003" / "deepspeed" / "offloaded_tensors").rglob("*.swp"))
    assert {path.parent.name for path in swapped} == {"rank00", "rank01"}  # it was on NVMe indeed
    assert not list((folder / "nvme").iterdir())


@needs_async_io
def test_nvme_is_resumed_as_it_was(folder: Path, nvme: Path) -> None:
    """DeepSpeed 0.19.8 alone would go on with the first weights and no step counts."""
    _copy_before_the_last_update(nvme, folder / "resumed")
    resumed = _train(folder, "resumed", "--resume=latest", f"--deepspeed={NVME}", f"--nvme_path={folder / 'nvme'}")
    assert metrics(resumed) == metrics(nvme)


@needs_async_io
def test_into_several_groups_on_nvme_and_out_again(folder: Path, zero2: Path, nvme: Path) -> None:
    """ZeRO-2 on two ranks, then one rank with its state in several files, then weights: none is lost on the way."""
    config = load_ds_config(NVME)
    config["zero_optimization"]["sub_group_size"] = 270_000  # of 0.7 M; below 1 MiB a group would stay in memory
    (folder / "small_groups.json").write_text(json.dumps(config))
    _copy_before_the_last_update(zero2, folder / "moved")
    moved = _train(
        folder, "moved", "--resume=latest", f"--deepspeed={folder / 'small_groups.json'}",
        f"--nvme_path={folder / 'nvme'}", "--gradient_accumulation_steps=2", num_ranks=1,
    )  # fmt: skip
    _assert_close(metrics(moved), metrics(zero2))
    files = (moved / "checkpoints" / "step-00000003" / "deepspeed" / "offloaded_tensors" / "rank00").iterdir()
    assert len([path for path in files if path.name.startswith("exp_avg-")]) > 1
    expected = _weights(zero2, folder / "zero2.out")
    for run in (moved, nvme):
        found = _weights(run, folder / f"{run.name}.out")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
