"""The keys that DeepSpeed reads, at every level of its configuration; it ignores most others without a word.

Taken from DeepSpeed 0.19.8 and kept here because importing it takes seconds; a test compares them with its classes.
"""

import difflib
import json
from collections.abc import Iterator
from typing import Any

_TOP = """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown pipeline prescale_gradients
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard
    timers torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
    vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
"""
_ZERO = """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions
    allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint offload_param
    offload_optimizer zenflow sub_group_size cpu_offload_param cpu_offload_use_pin_memory cpu_offload
    prefetch_bucket_size stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
    model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters
    max_reuse_distance stage3_max_reuse_distance gather_16bit_weights_on_model_save
    stage3_gather_16bit_weights_on_model_save module_granularity_threshold stage3_module_granularity_threshold
    use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params allgather_sequential
    stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1
    round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
    override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
"""

SECTIONS: dict[str, frozenset[str]] = {
    path: frozenset(keys.split())
    for path, keys in {
        "": _TOP,
        "zero_optimization": _ZERO,
        "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
        "zero_optimization.offload_optimizer": """device nvme_path buffer_count pin_memory pipeline_read pipeline_write
            fast_init ratio super_offload cpuadam_cores_perc""",
        "zero_optimization.leaf_module": "classes names name_suffixes",
        "bf16": """enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads
            bf16_optimizer_states""",
        "fp16": """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
            min_loss_scale fp16_master_weights_and_grads""",
        "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
        "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
        "activation_checkpointing": """partition_activations number_checkpoints contiguous_memory_optimization
            synchronize_checkpoint_boundary profile cpu_checkpointing""",
        "comms_logger": "enabled prof_all prof_ops verbose debug",
        "flops_profiler": """enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file""",
        "tensorboard": "enabled output_path job_name",
        "wandb": "enabled group team project",
        "csv_monitor": "enabled output_path job_name",
    }.items()
}
"""Dotted path of an object -> its keys. Objects that are not listed (they are rare) are not looked into."""


def unknown_keys(config: dict[str, Any], also: frozenset[str]) -> Iterator[str]:
    """A message for every key that DeepSpeed does not read; `also` are top-level keys that are told of elsewhere."""
    for path, known in SECTIONS.items():
        node: Any = config
        for part in path.split(".") if path else ():
            node = node.get(part) if isinstance(node, dict) else None
        for key in node if isinstance(node, dict) else ():
            if key not in known and not (path == "" and key in also):
                shown = f"{path}.{key}" if path else key
                yield f"{shown} is not a key that DeepSpeed reads{_hint(key, path, known)}"


def misplaced_values(config: dict[str, Any]) -> Iterator[str]:
    """A message for every known section that holds no object; `resolve_ds_config` tells of those it writes into.

    `null` too, which DeepSpeed takes for an offload that is not wanted and accelerate (1.15) fails on.
    """
    for path in SECTIONS.keys() - {"", "zero_optimization", "bf16", "fp16"}:
        node: Any = config
        for part in path.split("."):
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if not isinstance(node, dict):
            example = "device" if "offload" in path else min(SECTIONS[path])
            yield f'{path} is {json.dumps(node)}; it must be an object such as {{"{example}": ...}}, or be removed.'


def _hint(key: str, path: str, known: frozenset[str]) -> str:
    homes = [other or "the top level" for other, keys in SECTIONS.items() if key in keys and other != path]
    if len(homes) == 1:
        return f" there; move it to {homes[0]}."
    nearest = difflib.get_close_matches(key, sorted(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else "; remove it."
