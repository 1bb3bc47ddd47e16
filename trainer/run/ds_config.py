"""Read a DeepSpeed configuration, write in the values the trainer owns, refuse a file that disagrees with them.

Every setting has one owner. Batch sizes, clipping and precision are the command line's, because the loop needs them
with and without DeepSpeed, and so is the folder on NVMe, which no shipped file could name; ZeRO, offload and
communication are the file's. Where a file mentions one of ours it says
"auto" or repeats the command line's value. Neither torch nor DeepSpeed is imported, so mistakes show before they load.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.arguments import PretrainArguments
from trainer.errors import UserError
from trainer.run.ds_schema import misplaced_values, unknown_keys
from trainer.run.nvme import nvme_problems, own_folder

# In a checkout beside `trainer/`, in an installed wheel inside it.
_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED_FOLDERS = (_PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")

REFUSED_KEYS = {
    "optimizer": "--learning_rate, --weight_decay, --adam_beta1, --adam_beta2 and --adam_epsilon set the optimizer",
    "scheduler": "--learning_rate, --num_warmup_steps and --max_train_steps set the schedule",
    "amp": "--bf16 sets the precision",
    "bfloat16": 'it is the old name of "bf16"',
}

# accelerate fills the first four from the model when it prepares it; DeepSpeed itself reads "auto" in the last.
LATER_AUTO = frozenset(
    {
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "data_types.keep_in_fp32_modules",
    }
)

# The names that DeepSpeed takes for each.
_TYPES = {
    "communication_data_type": ("fp32", "bf16", "fp16"),
    "data_types.grad_accum_dtype": (
        *("fp32", "float32", "float", "torch.float32", "bf16", "bfloat16", "torch.bfloat16"),
        *("fp16", "float16", "half", "torch.float16"),
    ),
}


class DsConfigError(UserError):
    """The DeepSpeed configuration cannot be read or disagrees with the command line; the message lists everything."""


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configurations that come with the trainer."""
    folder = next((folder for folder in SHIPPED_FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.json"))} if folder else {}


def load_ds_config(name_or_path: str) -> dict[str, Any]:
    """Read a shipped configuration by name (`zero2`) or any JSON file by path.

    Raises:
        DsConfigError: there is no such file, or it is not one JSON object; the message has line and column.
    """
    shipped = shipped_configs()
    path = shipped.get(name_or_path, Path(name_or_path))
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_repeated_keys)
    except json.JSONDecodeError as error:
        raise DsConfigError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}.") from None
    except UnicodeDecodeError:
        raise DsConfigError(f"{path} is not a text file in UTF-8; --deepspeed takes a JSON file.") from None
    except OSError as error:
        raise DsConfigError(
            f"--deepspeed ({name_or_path}) cannot be read: {error.strerror}; "
            f"give the path of a JSON file or one of the shipped names: {', '.join(shipped) or 'none'}."
        ) from None
    except _RepeatedKeyError as error:
        raise DsConfigError(f"{path}: the key {error} occurs twice in one object; remove one of them.") from None
    if not isinstance(config, dict):
        raise DsConfigError(f'{path} must hold one JSON object: {{"zero_optimization": {{"stage": 2}}, ...}}.')
    return config


def ds_config_of(arguments: PretrainArguments, world_size: int) -> dict[str, Any] | None:
    """The resolved configuration of `--deepspeed`; None without. Raises `DsConfigError`."""
    if arguments.deepspeed is None:
        return None
    config = resolve_ds_config(
        load_ds_config(arguments.deepspeed),
        source=arguments.deepspeed,
        bf16=arguments.bf16,
        max_grad_norm=arguments.max_grad_norm,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        micro_batch_size=arguments.per_device_train_batch_size,
        world_size=world_size,
        nvme_path=arguments.nvme_path,
    )
    if arguments.nvme_path is not None:
        own = own_folder(arguments.nvme_path, arguments.output_dir or "")
        config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(own)
    return config


def resolve_ds_config(
    raw: dict[str, Any],
    *,
    source: str,
    bf16: bool,
    max_grad_norm: float,
    gradient_accumulation_steps: int,
    micro_batch_size: int,
    world_size: int,
    nvme_path: str | None = None,
) -> dict[str, Any]:
    """Fill what the trainer owns into a copy of `raw`; `source` names the file in messages.

    A `max_grad_norm` of 0 means no clipping, here and in DeepSpeed.

    Raises:
        DsConfigError: the file disagrees with the trainer; the message lists every place.
    """
    config = copy.deepcopy(raw)
    train_batch_size = micro_batch_size * gradient_accumulation_steps * world_size
    product = (
        f"--per_device_train_batch_size ({micro_batch_size}) x --gradient_accumulation_steps "
        f"({gradient_accumulation_steps}) x ranks ({world_size})"
    )
    problems = [
        *unknown_keys(config, frozenset(REFUSED_KEYS)),
        *sorted(misplaced_values(config)),
        *_data_type_problems(config),
        *(f"{key} is set, but {owner}; remove it." for key, owner in REFUSED_KEYS.items() if key in config),
        *_zero_stage_problems(config),
        *nvme_problems(config, nvme_path, source),
        *_own(config, "gradient_clipping", float(max_grad_norm), "--max_grad_norm"),
        *_own(config, "gradient_accumulation_steps", gradient_accumulation_steps, "--gradient_accumulation_steps"),
        *_own(config, "train_micro_batch_size_per_gpu", micro_batch_size, "--per_device_train_batch_size"),
        *_own(config, "train_batch_size", train_batch_size, product),
        *_own(config, "bf16.enabled", bf16, "--bf16"),
        *_own(config, "fp16.enabled", False, "this trainer, which knows fp32 and bf16 (--bf16) only,"),
        # The loop scales the loss for a mean over ranks and a step per window; anything else changes the gradients.
        *_own(config, "gradient_allreduce_op", "mean", "the loop"),
        *_own(config, "managed_gradient_accumulation", True, "the loop"),
    ]
    # On offloaded states torch's fused AdamW is as fast as DeepSpeed's and needs no compiler; true brings DeepSpeed's.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    problems += [
        f'{path} is "auto", which nothing fills in; write a value or remove it.'
        for path in _auto_paths(config)
        if path not in LATER_AUTO and path.partition(".")[0] not in REFUSED_KEYS
    ]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DsConfigError("\n  - ".join([f"{source} does not fit this run ({count}):", *problems]))
    return config


def partitioning(config: dict[str, Any]) -> dict[str, Any]:
    """What decides, beside the ranks, how DeepSpeed cuts and stores a run's state, from a resolved configuration.

    DeepSpeed loads a checkpoint as it is only into a run of the same partitioning.
    """
    zero = config["zero_optimization"]
    found = {key: zero.get(key, False) for key in ("stage", "round_robin_gradients", "parameter_alignment")}
    found |= {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    found["sub_group_size"] = zero.get("sub_group_size")
    found["bf16"] = config["bf16"]["enabled"]
    found["grad_accum_dtype"] = config.get("data_types", {}).get("grad_accum_dtype")  # with bf16, another optimizer
    found["zero_force_ds_cpu_optimizer"] = config["zero_force_ds_cpu_optimizer"]
    return found


class _RepeatedKeyError(Exception):
    pass


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(json.dumps(key))
        found[key] = value
    return found


def _zero_stage_problems(config: dict[str, Any]) -> Iterator[str]:
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        shown = "not set" if stage is None else json.dumps(stage)
        yield (
            f"zero_optimization.stage ({shown}) must be 1, 2 or 3; write one of them, or leave --deepspeed out to "
            "train without ZeRO."
        )
    if isinstance(zero, dict) and stage == "auto":
        zero["stage"] = None  # Told once: it must not be listed among the left-over "auto" values as well.


def _data_type_problems(config: dict[str, Any]) -> Iterator[str]:
    """DeepSpeed names neither the key nor the file."""
    for path, known in _TYPES.items():
        section, _, key = path.rpartition(".")
        node = config.get(section) if section else config
        value = node.get(key) if isinstance(node, dict) else None
        if value not in (None, "auto", *known):  # "auto" is told of with the others
            yield f'{path} ({json.dumps(value)}) must be "fp32", "bf16" or "fp16"; write one of them or remove it.'


def _own(config: dict[str, Any], path: str, value: object, owner: str) -> Iterator[str]:
    """Write `value` at the dotted `path` of `config`, or say why the file stands against it."""
    section, _, key = path.rpartition(".")
    node = config.setdefault(section, {}) if section else config
    if not isinstance(node, dict):
        yield f'{section} is {json.dumps(node)}; it must be an object such as {{"enabled": "auto"}}, or be removed.'
        return
    found = node.get(key, "auto")
    if found not in ("auto", value):
        yield (
            f"{path} is {json.dumps(found)}, but {owner} sets it to {json.dumps(value)}; "
            f'write "auto" in the file{_or_pass(owner, found)}.'
        )
    node[key] = value


def _or_pass(owner: str, found: object) -> str:
    """The second remedy, where the owner is one flag: use the file's value on the command line."""
    if not owner.startswith("--") or " " in owner:
        return ""
    if isinstance(found, bool):
        return f" or {'pass' if found else 'leave out'} {owner}"
    return f" or pass {owner} {found}"


def _auto_paths(node: object, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _auto_paths(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _auto_paths(value, f"{prefix}[{index}]")
    elif node == "auto":
        yield prefix
