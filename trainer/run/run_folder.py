"""Opens the run folder: a new run in a new folder, or a run that is continued; never one run over another."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trainer.arguments import PretrainArguments, dump_recipe
from trainer.errors import UserError
from trainer.layout import CHECKPOINTS_FOLDER, CONFIG_FILE, LOCK_FILE, METRICS_FILE
from trainer.model.sizes import ModelConfig
from trainer.run.checkpoint import TrainerState, find_checkpoint

_NEW_FILE_SECONDS = 60.0
# What decides the shapes of the weights.
_SHAPES = (
    *("model_type", "position_embeddings_type", "conv_depthwise_kernel_size"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "do_stable_layer_norm"),
    *("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm"),
    *("num_conv_pos_embeddings", "num_conv_pos_embedding_groups"),
    *("num_codevector_groups", "num_codevectors_per_group", "codevector_dim", "proj_codevector_dim"),
)
_START = {"init_from", "allow_missing_head"}
_TRACES = (CONFIG_FILE, METRICS_FILE, CHECKPOINTS_FOLDER)


def check_run_folder(
    arguments: PretrainArguments, known_damage: Mapping[Path, str] | None = None
) -> tuple[Path, Path | None, list[str]]:
    """The run folder, which may not exist yet, the checkpoint to resume from, and what was passed over for it.

    Raises `UserError`. `known_damage`: checkpoints that are not what they were, and why.

    `--resume latest` in a folder without a complete checkpoint starts anew, so that a job which is killed before its
    first checkpoint can be submitted again unchanged.
    """
    assert arguments.output_dir is not None  # the arguments' own rule
    folder = Path(arguments.output_dir)
    holds_a_run = any((folder / trace).exists() for trace in _TRACES)
    if arguments.resume is None and holds_a_run:
        raise UserError(
            f"output_dir ({folder}) holds another run; continue it with --resume latest or choose another folder."
        )
    checkpoint, passed_over = (
        (None, []) if arguments.resume is None else find_checkpoint(folder, arguments.resume, known_damage)
    )
    if checkpoint is not None and holds_a_run and folder.resolve() not in checkpoint.resolve().parents:
        raise UserError(
            f"output_dir ({folder}) holds another run than the checkpoint ({checkpoint}); name that run's folder, "
            "or a new one."
        )
    return folder, checkpoint, passed_over


def create_run_folder(folder: Path) -> None:
    """Make the run folder if it is missing. Raises `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir ({folder}) cannot be created: {error.strerror}; choose another folder.") from error


def write_settings(folder: Path, arguments: PretrainArguments) -> None:
    """Write `config.yaml`, whole or not at all."""
    new = folder / (CONFIG_FILE + ".new")
    new.write_text(dump_recipe(arguments), encoding="utf-8")
    os.replace(new, folder / CONFIG_FILE)


def sees_settings(folder: Path) -> bool:
    """Whether the settings that the main rank has just written are here too: whether the machines share the folder.

    Waits a little, for a network file system can hide a new file from other machines for some seconds.
    """
    deadline = time.monotonic() + _NEW_FILE_SECONDS
    while CONFIG_FILE not in os.listdir(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def changed_settings(folder: Path, arguments: PretrainArguments) -> list[str]:
    """`name: before -> now` for each setting that differs from the ones the run was last started with.

    Where a run started from is not among them: one that goes on does not read it.
    """
    try:
        before = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    if not isinstance(before, dict):
        return []
    now = yaml.safe_load(dump_recipe(arguments))
    names = sorted((set(before) | set(now)) - _START)
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]


def lock_run_folder(folder: Path) -> TextIOWrapper:
    """Hold the run folder while the returned file is open; the main rank calls it. Raises `UserError` if it is held.

    Ranks can outlive their launcher. Two runs that write one folder would prune each other's checkpoints.
    """
    try:
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir ({folder}) cannot be written: {error.strerror}; choose another folder.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(
            f"output_dir ({folder}) is being written by another run ({holder}); wait for it, end it, or choose "
            "another folder."
        ) from error
    except OSError:
        return file  # a file system without locks: better unprotected than unusable
    with contextlib.suppress(OSError):  # a full disk: the name of the holder is a courtesy, the lock is held
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


class Split(NamedTuple):
    """How a run cuts and stores its state."""

    engine: str
    """`deepspeed` or `plain`."""
    world_size: int
    partitioning: dict[str, Any] | None
    """See `ds_config.partitioning`; None without DeepSpeed, and in a checkpoint from before it was noted."""

    def __str__(self) -> str:
        stage = "" if self.partitioning is None else f" ZeRO-{self.partitioning['stage']}"
        engine = f"DeepSpeed{stage}" if self.engine == "deepspeed" else "plain PyTorch"
        return f"{self.world_size} rank(s) of {engine}"


def split_of(state: TrainerState) -> Split:
    """The split of the run that wrote a checkpoint."""
    return Split(state.engine, state.world_size, state.partitioning)


def needs_resharding(saved: Split, now: Split, checkpoint: Path) -> bool:
    """Whether the state in a checkpoint has to be cut anew for this run. Raises `UserError` where that cannot be done.

    A plain checkpoint is whole, so it fits any number of plain ranks.
    """
    if saved.engine == now.engine == "plain":
        return False
    here = now.partitioning or {}
    if here.get("offload_optimizer") == "nvme":
        return True  # DeepSpeed 0.19.8 does not restore weights and step counts from its own checkpoint
    if saved[:2] == now[:2] and saved.partitioning in (None, now.partitioning):
        return False
    if here.get("round_robin_gradients"):
        # DeepSpeed 0.19.8 notes addresses from before it shuffles the parameters
        raise UserError(
            f"checkpoint {checkpoint} was written by {saved}, this run is {now}, and state cannot be carried over "
            "into a run with zero_optimization.round_robin_gradients; set it to false in the --deepspeed file, or "
            "start it as it was."
        )
    return True


def check_same_frozen(state: TrainerState, checkpoint: Path, freeze_feature_encoder: bool) -> None:
    """Raise `UserError` where the optimizer of the checkpoint holds other parameters than this run's."""
    if state.freeze_feature_encoder != freeze_feature_encoder:
        raise UserError(
            f"freeze_feature_encoder ({freeze_feature_encoder}) must be {state.freeze_feature_encoder} as in the run "
            f"that wrote checkpoint {checkpoint}, or its optimizer state does not fit; to change it, convert the "
            "checkpoint and start a new run with --init_from."
        )


def check_model_matches(checkpoint: Path, config: ModelConfig) -> None:
    """Raise `UserError` where the checkpoint holds another model, naming the values that differ."""
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    wanted = json.loads(config.to_json_string(use_diff=False))
    different = [
        f"{name} ({saved[name]} there, {wanted.get(name)} here)"
        for name in _SHAPES
        if name in saved and saved[name] != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"checkpoint {checkpoint} holds another model: {'; '.join(different)}; "
            "use the recipe or --model_name_or_path that it was trained with."
        )
