"""Started on two CPU ranks by `conftest.py`: another trainer's loop under accelerate and DeepSpeed, saved its ways.

It writes `ROOT/<name>/state/` by accelerate's `save_state`, `ROOT/<name>/bare/` by DeepSpeed's `save_checkpoint` (with
the tag DeepSpeed chooses), `ROOT/<name>/pretrained/` with the model's configuration, and, gathered from the live
engine, `ROOT/<name>/expected.safetensors`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from safetensors.torch import save_file
from transformers import Wav2Vec2FeatureExtractor

from tests.unit.convert.save_checkpoints import POST, RUNS, Run, batches, build, full_state_dict

NAMES = {"accelerate-zero2": Run({"stage": 2}, POST), "accelerate-zero3": RUNS["zero3"]}


def train_and_save(run: Run, root: Path) -> None:
    model = build(run)
    if dist.get_rank() == 0:
        root.mkdir()
        model.config.save_pretrained(root / "pretrained")
        Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(root / "pretrained")
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": run.zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": run.bf16},
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    engine, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for batch in batches(model, torch.bfloat16 if run.bf16 else torch.float32):
        accelerator.backward(engine(**batch))
        optimizer.step()
    accelerator.save_state(str(root / "state"))
    engine.save_checkpoint(str(root / "bare"))
    expected = full_state_dict(engine)
    if dist.get_rank() == 0:
        save_file(expected, root / "expected.safetensors")
    dist.barrier()
    engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    name = sys.argv[2]
    train_and_save(NAMES[name], Path(sys.argv[1]) / name)
    dist.destroy_process_group()
