"""`--resume` on other ranks, in another ZeRO stage, with or without DeepSpeed: as the run that never changed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]
CORPUS = REPOSITORY / "tests" / "corpus"
WORKER = Path(__file__).with_name("reshard.py")
NUM_UPDATES = 12
TOLERANCE = 1e-4

FLAGS = [
    "--config=demo", f"--max_train_steps={NUM_UPDATES}", "--num_warmup_steps=4", "--save_total_limit=9",
    # a checkpoint falls within an interval of the log, whose sums it has to carry over
    "--logging_steps=2", "--saving_steps=3", "--eval_steps=12", "--per_device_train_batch_size=2",
    "--max_batch_seconds=4", "--num_workers=0",
    # of 2 ranks x 1, the diversity of all ranks is that of 2 micro-batches; of 1 rank x 2, that of each
    "--global_diversity=false",
]  # fmt: skip


class Leg(NamedTuple):
    """One start of a run: how it is launched, and which checkpoint it goes on from."""

    ranks: int
    engine: str
    """A name of `DS_CONFIGS`, or plain."""
    resumes: tuple[str, int] | None = None
    """Name of another leg and the update of its checkpoint."""


DS_CONFIGS: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
LEGS = {
    "undisturbed": Leg(2, "zero2"),
    "2 to 1 rank": Leg(1, "zero2", ("undisturbed", 3)),
    "1 to 2 ranks": Leg(2, "zero2", ("2 to 1 rank", 6)),
    "ZeRO-2 to 3": Leg(2, "zero3", ("undisturbed", 3)),
    "ZeRO-3 to 2 with offload": Leg(2, "zero2-offload", ("ZeRO-2 to 3", 6)),
    "ZeRO-2 to plain, 2 to 1 rank": Leg(1, "plain", ("undisturbed", 3)),
    "plain to ZeRO-3, 1 to 2 ranks": Leg(2, "zero3", ("ZeRO-2 to plain, 2 to 1 rank", 6)),
}

pytestmark = pytest.mark.slow


def _launch(ranks: int, *arguments: str) -> str:
    """Standard output and error of a program started on so many ranks, which must succeed."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launcher, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


def _start(leg: Leg, name: str, root: Path) -> str:
    arguments = ["-m", "trainer", "pretrain", *FLAGS, f"--dataset_name={CORPUS / 'train'}"]
    arguments += [f"--validation_dataset_name={CORPUS / 'validation'}", f"--cache_dir={root / 'cache'}"]
    arguments += [f"--output_dir={root / name}", f"--gradient_accumulation_steps={2 // leg.ranks}"]
    if leg.engine != "plain":
        config = root / f"{leg.engine}.json"
        zero = {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": DS_CONFIGS[leg.engine]}
        config.write_text(json.dumps(zero))
        arguments.append(f"--deepspeed={config}")
    if leg.resumes is not None:
        before, step = leg.resumes
        arguments.append(f"--resume={root / before / 'checkpoints' / f'step-{step:08d}'}")
    return _launch(leg.ranks, *arguments)


def _metrics(run: Path) -> dict[tuple[int, str], dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(line["step"], line["split"]): line for line in lines}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of all legs, and what each said."""
    root = tmp_path_factory.mktemp("elastic")
    return root, {name: _start(leg, name, root) for name, leg in LEGS.items()}


@pytest.mark.parametrize("name", [name for name in LEGS if name != "undisturbed"])
def test_losses_are_those_of_the_run_that_never_changed(runs: tuple[Path, dict[str, str]], name: str) -> None:
    root, said = runs
    leg = LEGS[name]
    assert leg.resumes is not None
    assert f"written by {LEGS[leg.resumes[0]].ranks} rank(s) of" in said[name]
    expected, found = _metrics(root / "undisturbed"), _metrics(root / name)
    first = leg.resumes[1] + 1
    assert set(found) == {key for key in expected if key[0] >= first}
    for key, line in found.items():
        for exact in ("num_targets", "audio_seconds", "learning_rate", "gumbel_temperature", "skipped_steps"):
            assert line.get(exact) == expected[key].get(exact), (key, exact)
        for close in ("loss", "contrastive_loss", "diversity_loss"):
            assert line[close] == pytest.approx(expected[key][close], abs=TOLERANCE), (key, close)
        if "grad_norm" in line:
            assert line["grad_norm"] == pytest.approx(expected[key]["grad_norm"], rel=1e-3), key


def test_every_engine_takes_every_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    """The programs compare, and fail where they find a difference. All 55 (with 1 and 2 ranks) were seen to work."""
    worker = [str(WORKER), str(tmp_path)]
    _launch(1, *worker, "plain")
    _launch(
        2, *worker, "zero1-bf16", "zero2", "zero3-offload", "zero3-bf16", "plain:zero1-bf16",
        "zero1-bf16:zero3-offload", "zero2:zero3-bf16", "zero3-offload:zero2-offload-bf16", "zero3-bf16:zero2",
    )  # fmt: skip
    _launch(
        1, *worker, "plain:zero3-offload", "zero1-bf16:zero2", "zero2:zero2-offload-bf16", "zero3-offload:zero3-bf16",
        "zero3-bf16:zero1-bf16",
    )  # fmt: skip
    _launch(1, *worker, "zero1-bf16:plain", "zero3-bf16:plain")
