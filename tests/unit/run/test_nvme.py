"""What has to hold for optimizer state on NVMe, and whose folder is whose."""

from pathlib import Path
from typing import Any

import pytest

from trainer.run.nvme import nvme_problems, own_folder, remove_files


def _problems(flag: object, *, stage: int = 3, param: str = "none", **offload: Any) -> list[str]:
    zero = {
        "stage": stage,
        "offload_param": {"device": param},
        "offload_optimizer": {"device": "nvme", "nvme_path": "auto", **offload},
    }
    config = {"zero_optimization": zero}
    return list(nvme_problems(config, None if flag is None else str(flag), "my.json"))


def test_the_flag_fills_in_the_folder(tmp_path: Path) -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    assert not list(nvme_problems(config, str(tmp_path), "my.json"))
    assert config["zero_optimization"]["offload_optimizer"]["nvme_path"] == str(tmp_path)
    assert not list(tmp_path.iterdir())  # trying it out leaves nothing
    assert not _problems(tmp_path, nvme_path=str(tmp_path))


def test_the_flag_is_needed_and_owns_the_folder(tmp_path: Path) -> None:
    offload = "zero_optimization.offload_optimizer"
    assert _problems(None) == [
        f'{offload}.device is "nvme", but --nvme_path is not set; give a folder on a local NVMe drive.'
    ]
    assert _problems(None, nvme_path="/fast") == [
        f'{offload}.device is "nvme", but --nvme_path is not set; pass --nvme_path /fast.'
    ]
    assert _problems(tmp_path, nvme_path="/fast") == [
        f'{offload}.nvme_path is "/fast", but --nvme_path sets it to "{tmp_path}"; write "auto" in the file or pass '
        "--nvme_path /fast."
    ]


def test_a_folder_that_is_none_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file"):
        assert _problems(path) == [f"--nvme_path ({path}) is not a folder; make it, or name another one."]
    (problem,) = _problems("/proc")
    assert problem.startswith("--nvme_path (/proc) cannot be written as DeepSpeed writes it: ")


def test_only_the_optimizer_of_zero_3_goes_there(tmp_path: Path) -> None:
    (problem,) = _problems(tmp_path, stage=2)
    assert problem.endswith('device ("nvme") needs zero_optimization.stage 3, not 2; change one of them.')
    (problem,) = _problems(tmp_path, param="nvme")
    assert 'offload_param.device ("nvme") must be "cpu" or "none"' in problem
    (problem,) = _problems(tmp_path, pipeline_write=True)
    assert "pipeline_write must be false" in problem


def test_the_flag_without_nvme_is_refused(tmp_path: Path) -> None:
    (problem,) = nvme_problems({"zero_optimization": {"stage": 2}}, str(tmp_path), "zero2")
    assert problem == (
        f"--nvme_path ({tmp_path}) is set, but zero2 puts nothing on NVMe; leave it out or use --deepspeed zero3_nvme."
    )


def test_every_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert own_folder("/fast", "runs/a") == own_folder("/fast", str(tmp_path / "runs" / "a"))
    assert own_folder("/fast", "runs/a") != own_folder("/fast", "runs/b")


def test_the_last_rank_removes_the_runs_folder_and_nothing_above(tmp_path: Path) -> None:
    ranks = [own_folder(str(tmp_path), "run") / "zero_stage_3" / "optimizer" / f"rank{rank}" for rank in range(2)]
    for folder in ranks:
        folder.mkdir(parents=True)
        (folder / "0_1.tensor.swp").touch()
    remove_files(ranks[1])
    assert ranks[0].is_dir() and not ranks[1].exists()
    remove_files(ranks[0])
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())
