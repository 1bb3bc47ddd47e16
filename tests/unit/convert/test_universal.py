"""DeepSpeed loads what `--to universal` writes: on one rank what two saved, and across ZeRO stages."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.cli import main
from trainer.convert.errors import ConversionError
from trainer.convert.safe_load import safe_load
from trainer.convert.universal import convert_to_universal
from trainer.convert.zero import _adam_entries

WORKER = Path(__file__).with_name("load_universal.py")
REPOSITORY = Path(__file__).parents[3]
PAIRS = [
    ("zero2", "zero2"),
    ("zero2", "zero3"),
    ("zero3", "zero2"),
    ("zero3-offload-conformer", "zero3-offload-conformer"),
    ("zero2-bf16-frozen", "zero2-bf16-frozen"),
]


@pytest.fixture(scope="module")
def loaded(zero_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("universal")
    for name in dict.fromkeys(source for source, _ in PAIRS):
        convert_to_universal(zero_root / name, folder / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = [sys.executable, str(WORKER), str(folder), *(":".join(pair) for pair in PAIRS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_deepspeed_has_the_same_weights_and_moments(zero_root: Path, loaded: Path, source: str, target: str) -> None:
    found = load_file(loaded / f"{source}:{target}.safetensors")
    weights, moments = (load_file(zero_root / source / f"{name}.safetensors") for name in ("expected", "moments"))
    trained = {name.split("/")[1] for name in moments}
    expected = moments | {name: weights[name] for name in trained}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {float(value) for name, value in found.items() if name.startswith("step/")} == {2.0}


def test_command_and_what_it_refuses(
    zero_run: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = zero_run("zero2-bf16-frozen"), tmp_path / "out"
    assert main(["convert", str(run.folder), str(out), "--to", "universal"]) == 0
    assert "verified" in capsys.readouterr().err
    frozen = "wav2vec2.feature_extractor.conv_layers.0.conv.weight"
    assert sorted(path.name for path in (out / "universal" / "zero" / frozen).iterdir()) == ["fp32.pt"]
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(run.folder), str(out), "--to", "universal"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", str(run.folder), str(out), "--to", "universal", "--overwrite", "--dtype", "bf16"]) == 2
    assert "must be fp32" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_leads_elsewhere_is_refused(plain_run: Any, tmp_path: Path, seal: Callable[..., None]) -> None:
    from safetensors.torch import save_file

    names = ["../../../outside", *list(plain_run.expected)[1:]]
    renamed = dict(zip(names, plain_run.expected.values(), strict=True))
    save_file(renamed, plain_run.step_folder / "model.safetensors")
    moments = {"state": {}, "param_groups": [{"lr": 0.1, "params": []}], "names": []}
    torch.save(moments, plain_run.step_folder / "optimizer.pt")
    seal(plain_run.step_folder, engine="plain", world_size=1)
    with pytest.raises(ConversionError, match=r"outside' is not the name of a weight"):
        convert_to_universal(plain_run.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "outside").exists()


def test_a_changed_bit_is_found_in_whatever_is_carried_over(zero_run: Callable[[str], Any], tmp_path: Path) -> None:
    """Moments too, which `trainer convert` does not read otherwise."""
    run = zero_run("zero2")
    path = run.step_folder / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    moment = _adam_entries(safe_load(path)["optimizer_state_dict"])[0]["exp_avg"]
    with path.open("r+b") as file:
        file.seek(moment.part(0, 1).start)
        byte = file.read(1)[0]
        file.seek(moment.part(0, 1).start)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ConversionError, match=r"rank_1_mp_rank_00_optim_states\.pt: CRC-32 is"):
        convert_to_universal(run.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
