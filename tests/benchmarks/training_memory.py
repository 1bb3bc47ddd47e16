"""Peak memory of real training against what `trainer plan` predicts: `python tests/benchmarks/training_memory.py`.

Needs a GPU of at least 24 GiB, of which the process may take no more than that, and the host memory that the plan
shows. Every case is a process of its own; `python tests/benchmarks/training_memory.py CASE` runs one and prints JSON.
On a GPU the peak is what the allocator had given out. The case `cpu:CONFIGURATION` is for machines without: a small
model in small buckets, whose live tensors are counted, those on the host among them.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.live_memory import LiveMemory
from trainer.data.audio import SAMPLE_RATE
from trainer.data.collate import Batch, MaskSettings, collate
from trainer.data.frames import FrameGeometry
from trainer.memory.activations import Workload
from trainer.memory.fit import Need, needs
from trainer.model.optim import build_optimizer
from trainer.model.pretraining import build_model
from trainer.model.sizes import ModelConfig, shipped_config
from trainer.run.ds_config import load_ds_config, resolve_ds_config
from trainer.run.engine import Engine, build_engine
from trainer.run.steps import forward

CAP_BYTES = 24 << 30
NUM_MICRO_BATCHES = 2
NUM_UPDATES = 3
_SMALL_BUCKET = 200_000


@dataclasses.dataclass(frozen=True)
class Case:
    """Utterances of 18.75 s (300,000 samples), as fairseq gave four of them to each 32 GB card."""

    size: str
    configuration: str
    num_utterances: int
    gradient_checkpointing: bool
    utterance_seconds: float = 18.75
    bucket: int | None = None  # elements, in place of the file's


CASES = {
    "large-75s": Case("large", "zero2", 4, gradient_checkpointing=False),
    "large-300s-checkpointing": Case("large", "zero2", 16, gradient_checkpointing=True),
    "xlsr_1b-zero2_offload": Case("xlsr_1b", "zero2_offload", 4, gradient_checkpointing=True),
    "xlsr_2b-zero3_offload": Case("xlsr_2b", "zero3_offload", 4, gradient_checkpointing=True),
}


def find_case(name: str) -> Case:
    """One of `CASES`, or a small one for the CPU."""
    device, _, configuration = name.partition(":")
    if device == "cpu":
        return Case("demo", configuration, 4, False, utterance_seconds=2.0, bucket=_SMALL_BUCKET)
    return CASES[name]


def measure(case: Case) -> dict[str, Any]:
    """Train a few updates on one rank; the peak after the first, which only fills what stays."""
    cuda = torch.cuda.is_available()
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        if total < CAP_BYTES:
            raise SystemExit(f"this GPU has {total / 2**30:.1f} GiB; {CAP_BYTES / 2**30:.0f} are needed")
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / total, 0)
    config = shipped_config(case.size)
    ds_config = _ds_config(case)
    batch = _batch(case, config)
    counter = contextlib.nullcontext() if cuda else LiveMemory()
    with counter:
        engine = _engine(case, config, ds_config)
        _update(engine, batch)
        if isinstance(counter, LiveMemory):
            counter.peak_bytes = counter.live_bytes
        else:
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        for _ in range(NUM_UPDATES - 1):
            _update(engine, batch)
        seconds = (time.monotonic() - start) / (NUM_UPDATES - 1)
    need = _need(case, config, ds_config, cuda=cuda)
    result = {"audio_seconds_per_second": NUM_MICRO_BATCHES * case.num_utterances * case.utterance_seconds / seconds}
    if isinstance(counter, LiveMemory):
        result |= {"predicted": need.card_bytes + need.states.offloaded, "measured": counter.peak_bytes}
    else:
        free, total = torch.cuda.mem_get_info()
        result |= {
            "predicted": need.card_bytes,
            "measured": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "outside_the_allocator": total - free - torch.cuda.memory_reserved(),
        }
    engine.close()
    return result


def _ds_config(case: Case) -> dict[str, Any] | None:
    if case.configuration == "plain":
        return None
    raw = load_ds_config(case.configuration)
    if case.bucket is not None:
        zero = raw["zero_optimization"]
        buckets = {"reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"} & zero.keys()
        zero |= dict.fromkeys(buckets, case.bucket)
    return resolve_ds_config(
        raw, source=case.configuration, bf16=True, max_grad_norm=1.0, micro_batch_size=case.num_utterances,
        gradient_accumulation_steps=NUM_MICRO_BATCHES, world_size=1,
    )  # fmt: skip


def _batch(case: Case, config: ModelConfig) -> Batch:
    rng = np.random.default_rng(0)
    num_samples = round(case.utterance_seconds * SAMPLE_RATE)
    return collate(
        [rng.standard_normal(num_samples, dtype=np.float32) for _ in range(case.num_utterances)],
        utterances=list(range(case.num_utterances)), epoch=0, seed=0,
        geometry=FrameGeometry(tuple(config.conv_kernel), tuple(config.conv_stride)),
        mask_settings=MaskSettings(config.mask_time_prob, config.mask_time_length, config.num_negatives),
    )  # fmt: skip


def _engine(case: Case, config: ModelConfig, ds_config: dict[str, Any] | None) -> Engine:
    model = build_model(config, seed=0)
    if case.gradient_checkpointing:
        model.checkpoint_activations()
    optimizer = build_optimizer(model, learning_rate=1e-5, betas=(0.9, 0.98), epsilon=1e-6, weight_decay=0.01)
    return build_engine(
        model, optimizer, ds_config=ds_config, bf16=True, max_grad_norm=1.0, log_with=None,
        project_folder=Path(tempfile.gettempdir()),
    )  # fmt: skip


def _update(engine: Engine, batch: Batch) -> None:
    for number in range(NUM_MICRO_BATCHES):
        with engine.micro_batch(last=number == NUM_MICRO_BATCHES - 1):
            terms = forward(engine, batch, gumbel_temperature=2.0)
            engine.backward(terms.loss, batch.num_targets * NUM_MICRO_BATCHES)
    assert not engine.step().skipped


def _need(case: Case, config: ModelConfig, ds_config: dict[str, Any] | None, *, cuda: bool) -> Need:
    workload = Workload(
        config, case.utterance_seconds, case.gradient_checkpointing, bf16=True, casts_model=ds_config is not None,
        cuda=cuda,
    )  # fmt: skip
    (need,) = needs(
        workload, {case.configuration: ds_config}, num_ranks=1, card_bytes=CAP_BYTES,
        batch_seconds=case.num_utterances * case.utterance_seconds, checkpointing=(case.gradient_checkpointing,),
    )  # fmt: skip
    return need


def run(name: str) -> dict[str, Any]:
    """`measure` in a process of its own. Raises `RuntimeError` with the end of what it wrote."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{name} ended with {result.returncode}:\n{result.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def as_row(name: str, found: dict[str, Any]) -> str:
    """A line of the results: predicted and measured peak of the tensors, and what lies around them."""
    gib = {key: value / 2**30 for key, value in found.items()}
    return (
        f"| {name} | {gib['predicted']:.2f} | {gib['measured']:.2f} | {found['predicted'] / found['measured']:.3f} | "
        f"{gib['reserved']:.2f} | {gib['outside_the_allocator']:.2f} | {found['audio_seconds_per_second']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", help=f"{', '.join(CASES)}, cpu:CONFIGURATION (default: all on the GPU)")
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(measure(find_case(given.case))))
        return
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; see --help for the cases without")
    print(f"# Peak memory of training on one card\n\n`python {' '.join(sys.argv)}`\n")
    print(
        f"{torch.cuda.get_device_name()}, capped at {CAP_BYTES / 2**30:.0f} GiB; torch {torch.__version__}, "
        f"Python {platform.python_version()}.\n"
    )
    print("| GiB | predicted | measured | ratio | reserved | outside the allocator | audio s/s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in CASES:
        print(as_row(name, run(name)), flush=True)


if __name__ == "__main__":
    main()
