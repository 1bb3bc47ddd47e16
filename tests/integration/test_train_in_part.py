"""Frozen front ends and a conformer's unused weights, in every engine: what is frozen stays, the rest learns."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration import train_in_part as worker

WORKER = Path(__file__).with_name("train_in_part.py")
REPOSITORY = Path(__file__).parents[2]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("in-part")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    for kind in ("plain", "deepspeed"):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER),
             str(folder), kind],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return {case.name: torch.load(folder / f"{case.name}.pt") for case in worker.CASES}


@pytest.mark.parametrize("case", worker.CASES, ids=lambda case: case.name)
def test_what_is_frozen_stays_and_the_rest_learns(outcomes: dict[str, Any], case: Any) -> None:
    before = worker.fresh_model(case.family)
    after = outcomes[case.name]["weights"]
    for name, value in before.named_parameters():
        unused = case.family == "conformer" and "pos_conv_embed" in name
        stays = unused or (case.frozen and "feature_extractor" in name)
        if not name.endswith(("k_proj.bias", "linear_k.bias")):  # softmax does not feel them
            start = value.to(after[name].dtype)  # bf16 under DeepSpeed
            assert torch.equal(start, after[name]) == stays, name


@pytest.mark.parametrize("case", worker.CASES, ids=lambda case: case.name)
def test_every_engine_has_the_same_second_loss(outcomes: dict[str, Any], case: Any) -> None:
    plain = case._replace(engine="plain", checkpointed=False, bf16=False)
    tolerance = 2e-2 if case.bf16 else 1e-5
    assert outcomes[case.name]["loss"] == pytest.approx(outcomes[plain.name]["loss"], rel=tolerance)
