"""`trainer plan`: what fits on a card before a job is queued, and the command that runs it."""

import argparse
import dataclasses
import difflib
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.arguments import FIELDS, ArgumentsError, RaisingParser, read_recipe, shipped_recipes

if TYPE_CHECKING:
    from trainer.memory.fit import Need

_UNITS = {
    "GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "TB": 10**12, "TiB": 2**40, "B": 1, "": 1,
}  # fmt: skip
# Where neither a flag nor the model's recipe says: what fairseq gives a card for large, in the crops of the recipes.
_BATCH_SECONDS = 75.0
_UTTERANCE_SECONDS = 20.0
_LEAST_BYTES = 10**8
_GUESSED_UNITS = [unit.lower() for unit in _UNITS if len(unit) > 1]  # nobody means bytes who writes 24kB

PLAIN = "plain"
_COMMAND_COLUMNS = 100
# From the one that costs least time to the one that costs most: recomputing takes a third of an update more, gathering
# weights half as much traffic again, and offloading a trip over PCIe for gradients and weights and a step on the CPU.
_BY_COST = tuple(
    (name, checkpointing)
    for name in ("zero2", "zero3", "zero2_offload", "zero3_offload")
    for checkpointing in (False, True)
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked, resolved."""

    model: str
    recipe: dict[str, Any]
    num_gpus: int
    gpu_memory: int
    cpu_memory: int | None
    batch_seconds: float
    utterance_seconds: float


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; complaints are raised as `ArgumentsError`."""
    parser = RaisingParser(
        prog="trainer plan", allow_abbrev=False,
        description="Show for each configuration what a card has to hold in bf16, what fits, and the command to run "
        "it. Needs no GPU: activations are counted by running the model on tensors without contents.",
        epilog="Memory is written 24GB (24 x 10^9 bytes), 24GiB (24 x 2^30), 24000MB or in bytes. A card sold as 24 "
        "GB has up to 24 GiB, of which about 23.6 can be used; 24GB is the careful way to write it.",
    )  # fmt: skip
    parser.add_argument(
        "--model", required=True, help="What --model_name_or_path of `trainer pretrain` takes: a shipped size, a "
        "folder with a config.json, or a Hub id.",
    )  # fmt: skip
    parser.add_argument("--gpu_memory", required=True, metavar="SIZE", help="Memory of each card, such as 24GB.")
    parser.add_argument("--num_gpus", type=int, default=1, metavar="N", help="Cards, all in one machine (default: 1).")
    parser.add_argument(
        "--batch_seconds", type=float, metavar="S", help="Seconds of audio in a micro-batch of one card, as "
        f"--max_batch_seconds (default: that of the model's recipe, otherwise {_BATCH_SECONDS:g}).",
    )  # fmt: skip
    parser.add_argument(
        "--max_duration_in_seconds", type=float, metavar="S", help="Longest utterance: the longer, the more a second "
        f"of audio takes (default: that of the model's recipe, otherwise {_UTTERANCE_SECONDS:g}).",
    )  # fmt: skip
    parser.add_argument(
        "--cpu_memory", metavar="SIZE", help="Memory of the machine (default: unknown, shown but not compared)."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table; all sizes in bytes.")
    return parser


def main(words: Sequence[str]) -> int:
    """Print the plan; returns the exit code 0. Raises `UserError`."""
    given = build_parser().parse_args(list(words))
    request = resolve(given)
    from trainer.memory.activations import Workload
    from trainer.memory.fit import needs
    from trainer.model.sizes import load_model_config
    from trainer.run.ds_config import load_ds_config, shipped_configs

    config = load_model_config(
        request.model, cache_dir=None, mask_time_prob=None, mask_time_length=None, field="model",
        say=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    workload = Workload(
        config,
        utterance_seconds=request.utterance_seconds,
        gradient_checkpointing=False,
        bf16=True,
        casts_model=True,
        feature_penalty_weight=request.recipe.get("feature_penalty_weight", 0.0),
        feature_grad_mult=request.recipe.get("feature_grad_mult", 1.0),
    )
    ds_configs = {PLAIN: None, **{name: load_ds_config(name) for name in shipped_configs()}}
    found = needs(
        workload,
        ds_configs,
        num_ranks=request.num_gpus,
        batch_seconds=request.batch_seconds,
        card_bytes=request.gpu_memory,
    )
    print(as_json(request, found) if given.json else as_text(request, found))
    return 0


def resolve(given: argparse.Namespace) -> Request:
    """Flags over the recipe of that name over defaults. Raises `ArgumentsError` naming every problem."""
    problems: list[str] = []
    recipe = read_recipe(given.model)[0] if given.model in shipped_recipes() else {}
    batch_seconds = _first(given.batch_seconds, recipe.get("max_batch_seconds"), _BATCH_SECONDS)
    utterance_seconds = _first(given.max_duration_in_seconds, recipe.get("max_duration_in_seconds"), _UTTERANCE_SECONDS)
    if given.num_gpus < 1:
        problems.append(f"num_gpus ({given.num_gpus}) must be at least 1; give the number of cards a run will use.")
    for name, value in (("batch_seconds", batch_seconds), ("max_duration_in_seconds", utterance_seconds)):
        if not 0.1 <= value < float("inf"):
            problems.append(f"{name} ({value:g}) must be at least 0.1 seconds; change --{name}.")
    sizes = {name: _parse_size(name, getattr(given, name), problems) for name in ("gpu_memory", "cpu_memory")}
    if problems:
        raise ArgumentsError("\n".join(problems))
    return Request(
        model=given.model,
        recipe=recipe,
        num_gpus=given.num_gpus,
        gpu_memory=sizes["gpu_memory"] or 0,
        cpu_memory=sizes["cpu_memory"],
        batch_seconds=batch_seconds,
        utterance_seconds=min(utterance_seconds, batch_seconds),
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _parse_size(name: str, text: str | None, problems: list[str]) -> int | None:
    """Bytes of a size such as 24GB; appends to `problems` what is wrong with it."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None:
        problems.append(f"{name} ({text}) must be a number and a unit, such as 24GB; change --{name}.")
        return None
    number, unit = match[1], match[2]
    if unit.lower() not in units:
        near = difflib.get_close_matches(unit.lower(), _GUESSED_UNITS, n=1, cutoff=0.6) or ["gb"]
        written = next(known for known in _UNITS if known.lower() == near[0])
        problems.append(f"{name} ({text}) has an unknown unit; did you mean {number}{written}?")
        return None
    size = int(float(number) * units[unit.lower()])
    if size < _LEAST_BYTES:
        hint = f"did you mean {number}GB?" if 1 <= float(number) < 10_000 else f"change --{name}."
        problems.append(f"{name} ({text}) is {size:,} bytes, in which nothing fits; {hint}")
    return size


def as_text(request: Request, found: "Sequence[Need]") -> str:
    """The table with what it is about above and the recommendation below."""
    from trainer.memory.fit import usable_bytes
    from trainer.memory.table import gib, table

    cards = "1 card" if request.num_gpus == 1 else f"{request.num_gpus} cards"
    lines = [
        f"{request.model} in bf16 on {cards} of {gib(request.gpu_memory)} GiB; tensors may take "
        f"{gib(usable_bytes(request.gpu_memory))} GiB, the rest is kept for CUDA and fragmentation.",
        f"Micro-batches of {request.batch_seconds:g} s per card, in utterances of {request.utterance_seconds:g} s. "
        "GiB per card; host memory is the machine's.",
        "",
        *table(found, card_bytes=request.gpu_memory, num_ranks=request.num_gpus, host_bytes=request.cpu_memory),
        "",
    ]
    choice, seconds = recommend(request, found)
    if choice is None:
        lines.append(
            "Nothing fits, not even one utterance. Try more cards (--num_gpus), shorter utterances "
            "(--max_duration_in_seconds), a host with more memory, or a smaller model."
        )
        return "\n".join(lines)
    if seconds < request.batch_seconds:
        lines.append(f"Micro-batches of {request.batch_seconds:g} s do not fit; of {seconds:g} s they do:")
    with_or_without = "with" if choice.gradient_checkpointing else "without"
    lines.append(f"Recommended: {choice.configuration} {with_or_without} gradient checkpointing")
    lines += _wrapped(command(request, choice, seconds))
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    """A command over several lines that can be pasted into a shell; a flag stays with its value."""
    first, *flags = re.split(r" (?=--)", text)
    lines = [first]
    for flag in flags:
        if len(lines[-1]) + len(flag) < _COMMAND_COLUMNS:
            lines[-1] += f" {flag}"
        else:
            lines.append(f"    {flag}")
    return [f"  {line} \\" for line in lines[:-1]] + [f"  {lines[-1]}"]


def as_json(request: Request, found: "Sequence[Need]") -> str:
    """Everything the table shows, in bytes and seconds."""
    from trainer.memory.fit import usable_bytes
    from trainer.memory.table import fits, host_fits

    choice, seconds = recommend(request, found)
    values = dataclasses.asdict(request)
    del values["recipe"]
    configurations = [
        {
            "configuration": need.configuration,
            "gradient_checkpointing": need.gradient_checkpointing,
            "fits": fits(need, request.gpu_memory) and host_fits(need, request.num_gpus, request.cpu_memory),
            "card_bytes": need.card_bytes,
            "parameters_bytes": need.states.parameters,
            "gradients_bytes": need.states.gradients,
            "optimizer_bytes": need.states.optimizer,
            "activations_bytes": dataclasses.asdict(need.activations),
            "communication_bytes": need.states.communication,
            "host_bytes": need.states.host * request.num_gpus,
            "disk_bytes": need.states.disk * request.num_gpus,
            "largest_batch_seconds": need.largest_seconds,
        }
        for need in found
    ]
    recommendation = choice and {
        "configuration": choice.configuration,
        "gradient_checkpointing": choice.gradient_checkpointing,
        "batch_seconds": seconds,
        "command": command(request, choice, seconds),
    }
    usable = usable_bytes(request.gpu_memory)
    content = {**values, "usable_bytes": usable, "configurations": configurations, "recommendation": recommendation}
    return json.dumps(content, indent=2)


def recommend(request: Request, found: "Sequence[Need]") -> "tuple[Need | None, float]":
    """The cheapest that fits with its seconds; where none takes so many, the one that takes most."""
    from trainer.memory.table import fits, host_fits

    known = {
        (need.configuration, need.gradient_checkpointing): need
        for need in found
        if host_fits(need, request.num_gpus, request.cpu_memory)
    }
    in_order = [known[key] for key in _BY_COST if key in known]
    for need in in_order:
        if fits(need, request.gpu_memory):
            return need, request.batch_seconds
    most = max(in_order, key=lambda need: need.largest_seconds, default=None)
    if most is None or most.largest_seconds == 0:
        return None, 0.0
    return most, max(float(int(most.largest_seconds)), request.utterance_seconds)  # it holds a whole utterance


def command(request: Request, need: "Need", batch_seconds: float) -> str:
    """What to type, but for the data: flags win over the recipe, so all that the plan assumes is there."""
    path = Path(request.model)
    name = (path.parent if path.suffix == ".json" else path).name or "model"
    model = shlex.quote(request.model)
    if request.recipe:
        flags = [f"--config {model}"]
        most = math.ceil(batch_seconds / request.utterance_seconds)
        if most > request.recipe.get("per_device_train_batch_size", most):
            flags.append(f"--per_device_train_batch_size {most}")
    else:
        flags = [f"--model_name_or_path {model}", "--per_device_train_batch_size 64"]
    flags += [
        "--dataset_name DATA",
        f"--output_dir {shlex.quote(f'runs/{name}')}",
        f"--deepspeed {need.configuration}",
        "--bf16",
    ]
    flags += [f"--max_duration_in_seconds {request.utterance_seconds:g}", f"--max_batch_seconds {batch_seconds:g}"]
    least = request.recipe.get("min_duration_in_seconds", FIELDS["min_duration_in_seconds"].default)
    if request.utterance_seconds < least:
        flags.append(f"--min_duration_in_seconds {request.utterance_seconds:g}")
    if need.gradient_checkpointing or request.recipe.get("gradient_checkpointing"):
        flags.append(f"--gradient_checkpointing {str(need.gradient_checkpointing).lower()}")
    return " ".join([f"deepspeed --num_gpus {request.num_gpus} --module trainer pretrain", *flags])
