"""Reads the fp32 weights, and where asked AdamW's moments, out of a ZeRO checkpoint, parameter by parameter.

Each rank's `*_optim_states.pt` holds flat fp32 partitions (the master weights, also in a bf16 run), and moments that
are cut like them; the model states hold the names, the shapes and what the optimizer does not own: buffers and frozen
parameters. `partition.py` tells how they are cut.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.convert.errors import ConversionError, known_layout
from trainer.convert.partition import cut_group, cut_parameters, used_numel
from trainer.convert.safe_load import StoredTensor, read_count, safe_load
from trainer.convert.swapped import SwappedGroups, noted_groups, read_swapped
from trainer.convert.weights import Weight, whole, zeros

RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")
STAGE_1_2_MODEL_FILE = "mp_rank_00_model_states.pt"
STAGE_1_2_PARTITIONS = "single_partition_of_fp32_groups"
STAGE_3_PARTITIONS = "fp32_flat_groups"
MOMENTS = ("exp_avg", "exp_avg_sq")

State = dict[str, Any]
Partitions = Sequence[Sequence[StoredTensor]]
"""The flat tensors of one kind (weights, or one of the moments): first by rank, then by group."""


class Moments(NamedTuple):
    """AdamW's state: `of["exp_avg"]` and `of["exp_avg_sq"]` by the name of each parameter that is trained."""

    of: dict[str, dict[str, Weight]]
    num_updates: int
    """Updates behind them, which the bias correction needs."""
    groups: list[dict[str, Any]]
    """Learning rate, betas, epsilon and weight decay of each parameter group, as torch saves them."""


class Slice(NamedTuple):
    """Elements `start` to `stop` of the flat tensor of one rank and group."""

    rank: int
    group: int
    start: int
    stop: int


class Place(NamedTuple):
    """Where a parameter lies: the slices that, end to end, are its elements."""

    shape: tuple[int, ...]
    slices: list[Slice]


class Shards(NamedTuple):
    """The opened files of one save, found to belong together."""

    optimizer_files: list[Path]
    states: list[State]
    model_files: list[Path]
    models: list[State]
    partitions: Partitions
    places: dict[str, Place]
    fixed: dict[str, Weight]
    """What the optimizer does not own: buffers and frozen parameters."""
    swapped: list[SwappedGroups]
    """By rank: groups that were on NVMe, whose flat tensors are files of their own."""


def read_zero(folder: Path, *, world_size: int) -> list[Weight]:
    """Every key of the model's state dict, in its order, from the folder that `save_checkpoint` wrote.

    Args:
        folder: the folder of one DeepSpeed tag.
        world_size: ranks of the run that saved it.

    Raises:
        ConversionError: a shard is missing, double, damaged or of another run, or the layout is unknown.
    """
    with known_layout(folder):
        return _weights(_open(folder, world_size))


def read_zero_training(folder: Path, *, world_size: int) -> tuple[list[Weight], Moments]:
    """What `read_zero` gives, and the state of AdamW for every parameter that it trains.

    Raises:
        ConversionError: as `read_zero`, or the optimizer was not an Adam.
    """
    with known_layout(folder):
        shards = _open(folder, world_size)
        num_updates = _optimizer_step(shards.states[0]) or 0
        if num_updates == 0:  # every one was left out so far
            moments = {
                key: {name: zeros(name, place.shape) for name, place in shards.places.items()} for key in MOMENTS
            }
        else:
            moments = {key: _gathered(shards.places, _moment_partitions(shards, key)) for key in MOMENTS}
        return _weights(shards), Moments(moments, num_updates, _adam(shards.states[0]).get("param_groups", []))


def _open(folder: Path, world_size: int) -> Shards:
    optimizer_files = rank_files(folder, "optim", world_size)
    states = [_field(path, safe_load(path), "optimizer_state_dict") for path in optimizer_files]
    _check_same_run(optimizer_files, states, world_size)
    if all(STAGE_1_2_PARTITIONS in state for state in states):
        model_files = [folder / STAGE_1_2_MODEL_FILE]
        return _stage_1_2(optimizer_files, states, model_files[0], safe_load(model_files[0]))
    if all(STAGE_3_PARTITIONS in state for state in states):
        model_files = rank_files(folder, "model", world_size)
        models = [safe_load(path) for path in model_files]
        _check_model_states(model_files, models)
        return _stage_3(optimizer_files, states, model_files, models)
    raise ConversionError(
        f"{optimizer_files[0]}: holds neither {STAGE_1_2_PARTITIONS} nor {STAGE_3_PARTITIONS}; "
        "only checkpoints of ZeRO-1, 2 and 3 can be converted."
    )


def _weights(shards: Shards) -> list[Weight]:
    found = _gathered(shards.places, shards.partitions) | shards.fixed
    return _in_model_order(shards.model_files[0], shards.models[0], found)


def describe_save(folder: Path) -> tuple[int, int]:
    """World size and update that the shards themselves tell: the step folder of another trainer has no other record.

    Raises:
        ConversionError: a file is unreadable or of another layout.
    """
    shards = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"))
    models = sorted(folder.glob("*_model_states.pt"))
    if not shards or not models:
        missing = "model" if shards else "optim"
        raise ConversionError(f"{folder}: *_{missing}_states.pt are missing; copy the shards of all nodes here.")
    with known_layout(folder):
        state = _field(shards[0], safe_load(shards[0]), "optimizer_state_dict")
        saved = _field(shards[0], state, "partition_count")
        step = int(_field(models[0], safe_load(models[0]), "global_steps"))
        return max(saved) if isinstance(saved, list) else saved, step


def rank_files(folder: Path, kind: str, world_size: int) -> list[Path]:
    """The `kind` ("optim" or "model") files of all ranks, in rank order."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = RANK_FILE.fullmatch(path.name)
        if match is None or match.group(3) != kind:
            continue
        rank = int(match.group(1))
        if int(match.group(2)) != 0:
            raise ConversionError(f"{path}: a shard of tensor parallelism, which is not supported.")
        if rank in found:
            raise ConversionError(
                f"{path}: rank {rank} has a second file ({found[rank].name}); remove the one that is not of this save."
            )
        if rank >= world_size:
            raise ConversionError(
                f"{path}: rank {rank} in a checkpoint of world_size ({world_size}); remove the files of another save."
            )
        found[rank] = path
    for rank in range(world_size):
        if rank not in found:
            raise ConversionError(
                f"{folder}: *zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt is missing (world_size is {world_size}); "
                "copy the shards of all nodes into this folder."
            )
    return [found[rank] for rank in range(world_size)]


def _stage_1_2(files: list[Path], states: list[State], model_file: Path, model: State) -> Shards:
    """Each optimizer group is one vector, cut over the ranks wherever the cut falls."""
    partitions = [_partitions(path, state, STAGE_1_2_PARTITIONS) for path, state in zip(files, states, strict=True)]
    # With this option DeepSpeed 0.19.8 notes addresses from before it shuffles the parameters: they are wrong.
    addresses_hold = not model["ds_config"]["zero_optimization"].get("round_robin_gradients", False)
    places: dict[str, Place] = {}
    for group, shapes in enumerate(_field(model_file, model, "param_shapes")):
        lengths = [rank_partitions[group].numel() for rank_partitions in partitions]
        numels = [math.prod(shape) for shape in shapes.values()]
        paddings = _alignment_paddings(states[0], group, len(shapes))
        try:
            cut = cut_group(lengths, numels, paddings)
        except ValueError as error:
            raise ConversionError(f"{files[0].parent}: group {group}: {error}; copy the checkpoint again.") from error
        found = {
            name: Place(tuple(shape), [Slice(piece.part, group, piece.start, piece.stop) for piece in where])
            for (name, shape), where in zip(shapes.items(), cut, strict=True)
        }
        if addresses_hold:
            _check_addresses(files, states, group, found)
        places |= found
    # Below ZeRO-3 the model states hold all tensors whole; those of the optimizer are copies, maybe rounded to bf16.
    fixed = _as_saved(model["module"], [name for name in model["module"] if name not in places])
    return Shards(files, states, [model_file], [model], partitions, places, fixed, [{} for _ in files])


def _stage_3(files: list[Path], states: list[State], model_files: list[Path], models: list[State]) -> Shards:
    """Every parameter is cut over the ranks; a rank's groups, end to end, hold its shares in order."""
    swapped = [noted_groups(model) for model in models]
    partitions = [
        [read_swapped(files[0].parent, rank, groups[number]) if number in groups else part
         for number, part in enumerate(_partitions(files[rank], states[rank], STAGE_3_PARTITIONS))]
        for rank, groups in enumerate(swapped)
    ]  # fmt: skip
    shapes = {name: shape for group in models[0]["param_shapes"] for name, shape in group.items()}
    try:
        cut = cut_parameters(
            [[part.numel() for part in parts] for parts in partitions], [math.prod(shape) for shape in shapes.values()]
        )
    except ValueError as error:
        raise ConversionError(
            f"{files[0].parent}: {error}; copy the checkpoint again, or, if another trainer had its optimizer on NVMe, "
            "save with an offload device of cpu or none."
        ) from error
    parts = [(rank, group) for rank, own in enumerate(partitions) for group in range(len(own))]
    places = {
        name: Place(tuple(shape), [Slice(*parts[piece.part], piece.start, piece.stop) for piece in where])
        for (name, shape), where in zip(shapes.items(), cut, strict=True)
    }
    fixed = _frozen_parameters(model_files, models) | _as_saved(models[0]["module"], models[0]["buffer_names"])
    return Shards(files, states, model_files, models, partitions, places, fixed, swapped)


def _frozen_parameters(files: Sequence[Path], models: Sequence[State]) -> dict[str, Weight]:
    """ZeRO-3: parameters that the optimizer does not own are cut like the others, but saved one by one."""
    found = {}
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        shares = []
        for rank, (path, model) in enumerate(zip(files, models, strict=True)):
            share = model["frozen_param_fragments"][name]
            used = used_numel(math.prod(shape), len(models), rank)
            if share.numel() < used:
                raise ConversionError(
                    f"{path}: {name} has {share.numel()} elements where it needs {used}; copy it again."
                )
            shares.append(share.part(0, used))
        found[name] = Weight(name, tuple(shape), share.dtype, tuple(shares))
    return found


def _as_saved(module: State, names: Sequence[str]) -> dict[str, Weight]:
    """Tensors that the model states hold whole: buffers, and below ZeRO-3 frozen parameters too."""
    return {name: whole(name, module[name]) for name in names}


def _in_model_order(path: Path, model: State, found: dict[str, Weight]) -> list[Weight]:
    """Sort by the model's state dict, give each tied name the weight it shares, and make sure that no key is left."""
    shared: dict[str, str] = model.get("shared_params") or {}
    weights = []
    for name in model["module"]:
        stored = shared.get(name, name)
        if stored not in found:
            raise ConversionError(f"{path}: no shard holds {name}; this checkpoint is not complete, take another one.")
        weight = found[stored]._replace(name=name)
        if (num_bytes := sum(stop - start for _, start, stop in weight.extents)) != weight.num_bytes:
            raise ConversionError(
                f"{path}: {name} has {num_bytes} bytes where its shape needs {weight.num_bytes}; "
                "copy the shards of one save only."
            )
        weights.append(weight)
    if left_over := set(found) - {weight.name for weight in weights}:
        raise ConversionError(f"{path}: does not list {sorted(left_over)[0]}; this is not the model of these shards.")
    return weights


def _gathered(places: dict[str, Place], partitions: Partitions) -> dict[str, Weight]:
    found = {}
    for name, (shape, slices) in places.items():
        extents = tuple(partitions[rank][group].part(start, stop) for rank, group, start, stop in slices)
        dtype = partitions[slices[0].rank][slices[0].group].dtype if slices else "float32"
        found[name] = Weight(name, shape, dtype, extents)
    return found


def _partitions(path: Path, state: State, key: str) -> list[StoredTensor]:
    partitions: list[StoredTensor] = state[key]
    for part in partitions:
        if part.dtype != "float32" or len(part.shape) != 1:
            raise ConversionError(
                f"{path}: {key} holds a {len(part.shape)}-dimensional tensor of {part.dtype}; "
                "only flat partitions with fp32 master weights can be converted."
            )
    return partitions


def _moment_partitions(shards: Shards, key: str) -> list[list[StoredTensor]]:
    """The flat tensors of one moment: cut like the weights, except that the padding at their end may be saved too."""
    found = []
    for rank, (path, state, weights) in enumerate(
        zip(shards.optimizer_files, shards.states, shards.partitions, strict=True)
    ):
        entries = _adam_entries(state)
        swapped = shards.swapped[rank]
        own = []
        for group, weight in enumerate(weights):
            moment = entries.get(group, {}).get(key)
            if group in swapped:
                moment = read_swapped(path.parent, rank, swapped[group], key)
            if not isinstance(moment, StoredTensor) or len(moment.shape) != 1 or moment.numel() < weight.numel():
                raise ConversionError(
                    f"{path}: group {group} has no {key} as long as its weights; only the state of AdamW can be "
                    "carried over."
                )
            own.append(moment)
        found.append(own)
    return found


def _alignment_paddings(state: State, group: int, num_parameters: int) -> list[int]:
    """Elements left free after each parameter (`parameter_alignment` of DeepSpeed's configuration)."""
    paddings = state.get("param_alignment_paddings")
    return [0] * num_parameters if paddings is None else list(paddings[group])


def _check_same_run(files: Sequence[Path], states: Sequence[State], world_size: int) -> None:
    steps = [_optimizer_step(state) for state in states]
    for path, state, step in zip(files, states, steps, strict=True):
        saved = _field(path, state, "partition_count")
        count = max(saved) if isinstance(saved, list) else saved
        if count != world_size:
            raise ConversionError(
                f"{path}: saved by a run of world size {count}, the checkpoint by one of {world_size}; "
                "copy the shards of one save only."
            )
        if None not in (step, steps[0]) and step != steps[0]:
            raise ConversionError(
                f"{path}: optimizer step {step}, but {files[0].name} has {steps[0]}; copy the shards of one save only."
            )


def _optimizer_step(state: State) -> int | None:
    """Updates that the wrapped Adam has made; None where its state has another form or tells none."""
    steps = {read_count(entry["step"]) for entry in _adam_entries(state).values() if "step" in entry}
    return max(steps) if steps else None


def _adam_entries(state: State) -> dict[int, State]:
    """The state of the wrapped optimizer by the number of its group; empty where it has another form."""
    return _adam(state).get("state") or {}


def _adam(state: State) -> State:
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    return base if isinstance(base, dict) else {}


def _check_model_states(files: Sequence[Path], models: Sequence[State]) -> None:
    for path, model in zip(files, models, strict=True):
        for key in ("param_shapes", "global_steps", "frozen_param_shapes", "buffer_names"):
            if _field(path, model, key) != models[0][key]:
                raise ConversionError(
                    f"{path}: {key} differs from that of {files[0].name}; copy the shards of one save only."
                )


def _check_addresses(files: Sequence[Path], states: Sequence[State], group: int, places: dict[str, Place]) -> None:
    """Compare our cuts of each rank's partition with those DeepSpeed wrote down: tells a shard of another rank."""
    for rank, (path, state) in enumerate(zip(files, states, strict=True)):
        noted = _field(path, state, "param_slice_mappings")[group]
        saved = {(name, address.start, address.start + address.numel) for name, address in noted.items()}
        computed = {
            (name, piece.start, piece.stop)
            for name, place in places.items()
            for piece in place.slices
            if piece.rank == rank
        }
        if saved != computed:
            raise ConversionError(
                f"{path}: {min(saved ^ computed)[0]} lies elsewhere in this shard than rank {rank} has it; "
                "copy each shard again under its own name."
            )


def _field(path: Path, state: State, key: str) -> Any:
    if key not in state:
        raise ConversionError(f"{path}: has no {key}; this is not a file of a ZeRO checkpoint of DeepSpeed 0.19.")
    return state[key]
