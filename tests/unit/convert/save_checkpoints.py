"""Started on two CPU ranks by `conftest.py`: trains tiny models under DeepSpeed for two updates and saves each.

For every row of `RUNS` it writes `ROOT/<name>/step-00000002/` (config, preprocessor, `deepspeed/`) and, gathered from
the live engine and not from its files, `ROOT/<name>/expected.safetensors`: what a conversion to fp32 must give, bit by
bit; `moments.safetensors` beside it has the state of Adam.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForPreTraining,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
)

# an extension of DeepSpeed's inference, which takes a minute to compile
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

NUM_SAMPLES = 400
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (7, 9),  # odd sizes, so that partitions and parameters do not end together
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 5,
    "codevector_dim": 16,
    "proj_codevector_dim": 7,
    "mask_time_prob": 0.5,
    "layerdrop": 0.0,
}


class Run(NamedTuple):
    zero: dict[str, Any]
    config: dict[str, Any]
    bf16: bool = False
    fp32_gradients: bool = False
    frozen: bool = False
    tied: bool = False
    conformer: bool = False


STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
POST = {"do_stable_layer_norm": False, "feat_extract_norm": "group"}
CPU = {"device": "cpu"}
RUNS = {
    "zero1-frozen": Run({"stage": 1}, POST, frozen=True),
    "zero1-bf16-fp32-gradients": Run({"stage": 1}, STABLE, bf16=True, fp32_gradients=True, tied=True),
    "zero2": Run({"stage": 2}, STABLE),
    "zero2-bf16-frozen": Run({"stage": 2}, POST, bf16=True, frozen=True),
    "zero2-offload-aligned": Run(
        {"stage": 2, "offload_optimizer": CPU, "parameter_alignment": True, "round_robin_gradients": True}, POST
    ),
    "zero3": Run({"stage": 3, "stage3_param_persistence_threshold": 0}, STABLE),
    "zero3-bf16-subgroups-frozen-tied": Run(
        {"stage": 3, "sub_group_size": 500}, POST, bf16=True, frozen=True, tied=True
    ),
    "zero3-offload-conformer": Run({"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, {}, conformer=True),
}


class LossOnly(Wav2Vec2ForPreTraining):
    """The stock model; its forward returns one differentiable tensor, as DeepSpeed wants it."""

    def forward(self, **batch: torch.Tensor) -> Any:
        return super().forward(**batch).loss


class ConformerLossOnly(Wav2Vec2ConformerForPreTraining):
    def forward(self, **batch: torch.Tensor) -> Any:
        return super().forward(**batch).loss


def build(run: Run) -> Any:
    torch.manual_seed(0)
    if run.conformer:
        model: Any = ConformerLossOnly(Wav2Vec2ConformerConfig(**SIZES, conv_depthwise_kernel_size=3))
    else:
        model = LossOnly(Wav2Vec2Config(**SIZES, **run.config))
    if run.frozen:
        model.freeze_feature_encoder()
    if run.tied:
        model.project_q.weight = model.project_hid.weight
    model.config.architectures = [type(model).__bases__[0].__name__]
    return model


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": 0.01},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def deepspeed_config(run: Run) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": run.zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the CPU Adam op takes a minute to compile and changes no file
        "bf16": {"enabled": run.bf16},
    }
    if run.fp32_gradients:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def batches(model: Any, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    num_frames = int(model._get_feat_extract_output_lengths(NUM_SAMPLES))
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        yield {
            "input_values": torch.randn(1, NUM_SAMPLES, generator=generator).to(dtype),
            "mask_time_indices": (torch.arange(num_frames) % 2 == 0)[None],
            "sampled_negative_indices": torch.randint(0, num_frames, (1, num_frames, 3), generator=generator),
        }


def full_state_dict(engine: Any) -> dict[str, torch.Tensor]:
    """Every key of the stock state dict in fp32, gathered over the ranks (a collective: call it on all of them).

    The module itself holds the fp32 weights of an fp32 run; the master weights of a bf16 run need DeepSpeed's function.
    """
    state = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            full = parameter.detach().float().clone()
        if parameter.requires_grad and parameter.dtype != torch.float32:
            full = safe_get_full_fp32_param(parameter).detach().clone()
        state[name] = full
    for name, buffer in engine.module.named_buffers():
        if name in engine.module.state_dict():  # the others are not persistent
            state[name] = buffer.float() if buffer.is_floating_point() else buffer.clone()
    return state


def full_moments(engine: Any) -> dict[str, torch.Tensor]:
    """`exp_avg/NAME` and `exp_avg_sq/NAME` of every trained parameter (a collective)."""
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.19.8 links the states of all groups after the step of the first, when the others have none
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {
        f"{key}/{name}": safe_get_full_optimizer_state(parameter, key).detach().clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
        for key in ("exp_avg", "exp_avg_sq")
    }


def train_and_save(run: Run, root: Path) -> None:
    model = build(run)
    step_folder = root / "step-00000002"
    if dist.get_rank() == 0:
        step_folder.mkdir(parents=True)
        model.config.save_pretrained(step_folder)
        Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(step_folder)
    dist.barrier()
    # A large rate: the two updates must move every parameter visibly away from its bf16-rounded start.
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(run))[0]
    for batch in batches(model, torch.bfloat16 if run.bf16 else torch.float32):
        engine.backward(engine(**batch))
        engine.step()
    engine.save_checkpoint(str(step_folder), tag="deepspeed", save_latest=False)
    expected, moments = full_state_dict(engine), full_moments(engine)
    if dist.get_rank() == 0:
        save_file(expected, root / "expected.safetensors")
        save_file(moments, root / "moments.safetensors")
    dist.barrier()
    engine.destroy()


def main(root: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for name in names or RUNS:
        train_and_save(RUNS[name], root / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
