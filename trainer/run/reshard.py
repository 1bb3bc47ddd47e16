"""Puts a checkpoint into an engine that cuts its state otherwise: other ranks, another ZeRO stage, or none.

The checkpoint is read one whole parameter at a time and each rank keeps the part that is its own, so every number that
is restored is the one that was saved. DeepSpeed's universal checkpoint gets there over a second copy on disk, and only
within ZeRO-1 and 2 or within ZeRO-3.

What is touched of DeepSpeed (as of 0.19.8) are attributes of its live objects; nothing of it is imported here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.convert.training_state import TrainingState
from trainer.errors import UserError


def load_plain(model: nn.Module, optimizer: torch.optim.Optimizer, source: TrainingState) -> None:
    """Into a whole model and its AdamW, the same on every rank. Raises `UserError`."""
    _check_same_names(model, source)
    targets = model.state_dict()
    trained = dict(model.named_parameters())
    with torch.no_grad():
        for weight in source.weights:
            targets[weight.name].copy_(weight.read())
        for key, moments in source.moments.of.items():
            for name, moment in moments.items():
                state = optimizer.state[trained[name]]
                state["step"] = _step_of(optimizer, source, trained[name].device)
                state[key] = torch.empty_like(trained[name]).copy_(moment.read())


def load_zero(engine: Any, source: TrainingState, *, rank: int) -> None:
    """Into a DeepSpeed engine of ZeRO-1, 2 or 3; a collective, every rank calls it. Raises `UserError`."""
    module: nn.Module = engine.module
    _check_same_names(module, source)
    with torch.no_grad():
        if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
            _load_stage_3(module, engine.optimizer, source, rank)
        else:
            _load_stage_1_2(module, engine.optimizer, source)


def _load_stage_1_2(module: nn.Module, zero: Any, source: TrainingState) -> None:
    """Each rank owns one piece of the vector of every optimizer group; all ranks hold the whole model besides."""
    _fresh_states(zero.optimizer, [group["params"][0] for group in zero.optimizer.param_groups], source)
    zero._lazy_init_hp_params_optimizer_state()  # otherwise done by the first step: finds each parameter's moments
    targets = module.state_dict()
    parameters = dict(module.named_parameters())
    for weight in source.weights:
        parameter = parameters.get(weight.name)
        if parameter is None or not parameter.requires_grad:
            targets[weight.name].copy_(weight.read())
        elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
            set_full: Callable[..., None] = parameter.set_full_hp_param  # type: ignore[attr-defined]
            set_full(weight.read())
            for key, moments in source.moments.of.items():
                set_full(moments[weight.name].read(), key)
    zero.update_lp_params()


def _load_stage_3(module: nn.Module, zero: Any, source: TrainingState, rank: int) -> None:
    """Each rank owns a share of every parameter, frozen ones included, and nothing is whole but buffers.

    Groups come into memory one after another where they are kept on NVMe.
    """
    zero.checkpoint_event_prologue()  # parts with the small parameters that are kept whole between uses
    targets = module.state_dict()
    names: dict[Any, str] = {parameter: name for name, parameter in module.named_parameters()}
    parameters: dict[str, Any] = {name: parameter for parameter, name in names.items()}
    by_name = {weight.name: weight for weight in source.weights}
    for name, weight in by_name.items():
        parameter = parameters.get(name)
        if parameter is None:
            targets[name].copy_(weight.read())
        elif not parameter.requires_grad:
            parameter.ds_tensor.copy_(_own_share(weight.read(), parameter.ds_tensor.numel(), rank))
    for number, group in enumerate(zero.fp16_groups):
        on_nvme = zero._swappable_optimizer_subgroup(number)
        if on_nvme:
            zero._optimizer_states_and_gradient_swap_in(number)
        flat = zero.fp32_partitioned_groups_flat[number]
        _fresh_states(zero.optimizer, [flat], source)
        for parameter in group:
            name = names[parameter]
            _, start, share = zero.grad_position[zero.get_param_id(parameter)]
            flat[start : start + share].copy_(_own_share(by_name[name].read(), share, rank))
            for key, moments in source.moments.of.items():
                moment = zero.optimizer.state[flat][key]
                moment[start : start + share].copy_(_own_share(moments[name].read(), share, rank))
        zero._reassign_or_swap_out_partitioned_parameters(number)  # the shares that forward takes, from the fp32 ones
        if on_nvme:
            zero._optimizer_states_and_gradient_swap_out(number)
    zero.checkpoint_event_epilogue()


def swapped_groups(zero: Any) -> list[tuple[str, int] | None]:
    """For every group of a DeepSpeed optimizer the name and length of its files on NVMe; None if it is in memory.

    A checkpoint needs it noted: file names alone do not tell which group they hold, nor where padding begins.
    """
    if getattr(zero, "optimizer_swapper", None) is None:
        return []
    return [
        (str(flat.ds_id), int(zero.fp16_partitioned_groups_flat_numel[number]))
        if zero._swappable_optimizer_subgroup(number)
        else None
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat)
    ]


def _own_share(full: Tensor, numel: int, rank: int) -> Tensor:
    """This rank's share of a parameter under ZeRO-3; shares are of equal length, the last ones padded."""
    own = full.reshape(-1)[rank * numel : (rank + 1) * numel]
    return nn.functional.pad(own, (0, numel - own.numel()))


def _fresh_states(optimizer: torch.optim.Optimizer, flat: list[Tensor], source: TrainingState) -> None:
    """Adam's state of every flat partition, as its first step would make it, at the update of the checkpoint."""
    for partition in flat:
        optimizer.state[partition] = {
            "step": _step_of(optimizer, source, partition.device),
            **{key: torch.zeros_like(partition, requires_grad=False) for key in source.moments.of},
        }


def _step_of(optimizer: torch.optim.Optimizer, source: TrainingState, device: torch.device) -> Tensor | int:
    """The count behind the bias correction: torch's AdamW keeps it as a tensor, DeepSpeed's CPU Adam as a number."""
    if isinstance(optimizer, torch.optim.Adam):
        return torch.tensor(float(source.moments.num_updates), device=device)
    return source.moments.num_updates


def _check_same_names(model: nn.Module, source: TrainingState) -> None:
    there, here = {weight.name for weight in source.weights}, set(model.state_dict())
    if there != here:
        raise UserError(
            f"the checkpoint does not hold this model: {sorted(there ^ here)[0]} is in one of them only; use the "
            "recipe or --model_name_or_path that it was trained with."
        )
