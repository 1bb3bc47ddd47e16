"""Real checkpoints for the tests of this folder: saved once per session by two CPU ranks under DeepSpeed."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

WORKER = Path(__file__).with_name("save_checkpoints.py")
ACCELERATE_WORKER = Path(__file__).with_name("save_accelerate.py")
ACCELERATE_RUNS = ("accelerate-zero2", "accelerate-zero3")
ZERO_RUNS = (
    "zero1-bf16-fp32-gradients",
    "zero1-frozen",
    "zero2",
    "zero2-bf16-frozen",
    "zero2-offload-aligned",
    "zero3",
    "zero3-bf16-subgroups-frozen-tied",
    "zero3-offload-conformer",
)
STEP_NAME = "step-00000002"


class SavedRun(NamedTuple):
    """A run folder (`checkpoints/step-00000002/`) and the state dict that its conversion to fp32 must give."""

    folder: Path
    expected: dict[str, torch.Tensor]

    @property
    def step_folder(self) -> Path:
        return self.folder / "checkpoints" / STEP_NAME


@pytest.fixture(scope="session")
def zero_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run folder per entry of `ZERO_RUNS`."""
    root = tmp_path_factory.mktemp("zero")
    run_on_two_ranks(WORKER, str(root))
    assert sorted(path.name for path in root.iterdir()) == sorted(ZERO_RUNS)
    for run in root.iterdir():
        step_folder = run / "checkpoints" / STEP_NAME
        step_folder.parent.mkdir()
        (run / STEP_NAME).rename(step_folder)
        write_trainer_files(step_folder)
    return root


@pytest.fixture(scope="session")
def accelerate_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another trainer saved with plain accelerate and DeepSpeed; see `save_accelerate.py`."""
    root = tmp_path_factory.mktemp("accelerate")
    for name in ACCELERATE_RUNS:  # one process makes one Accelerator
        run_on_two_ranks(ACCELERATE_WORKER, str(root), name)
    return root


def run_on_two_ranks(worker: Path, *arguments: str) -> None:
    # Two versions of DeepSpeed or torch in one folder of compiled ops break each other.
    extensions = Path.home() / ".cache" / "torch_extensions"
    extensions /= f"deepspeed-{version('deepspeed')}-torch-{version('torch')}"
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(extensions)),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja lies beside python
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(worker), *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(params=ZERO_RUNS)
def any_zero_run(request: pytest.FixtureRequest, zero_root: Path) -> SavedRun:
    return _saved(zero_root / request.param)


@pytest.fixture
def zero_run(zero_root: Path, tmp_path: Path) -> Callable[[str], SavedRun]:
    """Gives a copy, to be damaged, of the run of a given name."""

    def copy(name: str) -> SavedRun:
        shutil.copytree(zero_root / name, tmp_path / name)
        return _saved(tmp_path / name)

    return copy


@pytest.fixture
def plain_run(zero_root: Path, tmp_path: Path) -> SavedRun:
    """A run without DeepSpeed, with the weights of `zero2`."""
    source = _saved(zero_root / "zero2")
    step_folder = tmp_path / "plain" / "checkpoints" / STEP_NAME
    step_folder.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(source.step_folder / name, step_folder)
    save_file(source.expected, step_folder / "model.safetensors")
    write_trainer_files(step_folder, engine="plain", world_size=1)
    return SavedRun(tmp_path / "plain", source.expected)


@pytest.fixture
def seal() -> Callable[..., None]:
    """Writes a checkpoint's trainer state and manifest anew, so that a damage passes the manifest."""
    return write_trainer_files


def write_trainer_files(step_folder: Path, **changes: Any) -> None:
    state = {"version": 1, "step": 2, "world_size": 2, "engine": "deepspeed"} | changes
    (step_folder / "trainer_state.json").write_text(json.dumps(state))
    (step_folder / "manifest.json").unlink(missing_ok=True)
    files = {
        str(path.relative_to(step_folder)): {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
        for path in sorted(step_folder.rglob("*"))
        if path.is_file()
    }
    (step_folder / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))


def _saved(folder: Path) -> SavedRun:
    return SavedRun(folder, load_file(folder / "expected.safetensors"))
