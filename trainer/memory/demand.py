"""A run's own demand for memory: a warning before it starts, an explanation where it was too much."""

import contextlib
import dataclasses
import errno
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from trainer.arguments import PretrainArguments
from trainer.data.audio import SAMPLE_RATE
from trainer.data.batching import Batching
from trainer.errors import OutOfMemory
from trainer.memory.activations import Workload
from trainer.memory.fit import Need, needs, usable_bytes
from trainer.memory.table import fits, gib, table
from trainer.model.sizes import ModelConfig

# How torch, the C++ library below it and the operating system say it where they raise no error of its own type.
_SAYINGS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "bad_alloc")


@dataclasses.dataclass(frozen=True)
class Demand:
    """What decides how much memory a run takes."""

    workload: Workload
    configuration: str
    ds_config: dict[str, Any] | None
    num_ranks: int
    batch_seconds: float
    """Seconds of the largest micro-batch."""
    flag: str
    """The flag that sets it, with its value."""

    def needs(self, card_bytes: int) -> list[Need]:
        """As it is, then, where that is possible, with gradient checkpointing."""
        checkpointing = (True,) if self.workload.gradient_checkpointing else (False, True)
        return needs(
            self.workload,
            {self.configuration: self.ds_config},
            num_ranks=self.num_ranks,
            batch_seconds=self.batch_seconds,
            card_bytes=card_bytes,
            checkpointing=checkpointing,
        )


def demand_of(
    arguments: PretrainArguments,
    config: ModelConfig,
    ds_config: dict[str, Any] | None,
    batching: Batching,
    *,
    num_ranks: int,
    cuda: bool,
) -> Demand:
    """The demand of a run on this data; nothing is counted yet."""
    limits = batching.limits
    longest = min(int(batching.num_samples.max()), limits.max_length)
    workload = Workload(
        config,
        utterance_seconds=longest / SAMPLE_RATE,
        gradient_checkpointing=arguments.gradient_checkpointing,
        bf16=arguments.bf16,
        casts_model=ds_config is not None,
        cuda=cuda,
        freeze_feature_encoder=arguments.freeze_feature_encoder,
        feature_penalty_weight=arguments.feature_penalty_weight,
        feature_grad_mult=arguments.feature_grad_mult,
    )
    most = min(limits.max_batch_samples, limits.max_batch_size * longest)
    by_seconds = arguments.max_batch_seconds is not None and most == limits.max_batch_samples
    value = f"{arguments.max_batch_seconds:g}" if by_seconds else arguments.per_device_train_batch_size
    return Demand(
        workload,
        configuration="plain" if arguments.deepspeed is None else arguments.deepspeed,
        ds_config=ds_config,
        num_ranks=num_ranks,
        batch_seconds=most / SAMPLE_RATE,
        flag=f"--{'max_batch_seconds' if by_seconds else 'per_device_train_batch_size'} ({value})",
    )


def card_bytes_here() -> int | None:
    """Memory of this process's card; None where there is none and runs use the CPU."""
    return int(torch.cuda.get_device_properties().total_memory) if torch.cuda.is_available() else None


def warning_where_too_much(demand: Demand, card_bytes: int) -> str | None:
    """What to tell before a run on cards of `card_bytes` that will not hold it; None where they will."""
    as_it_is, *others = demand.needs(card_bytes)
    if fits(as_it_is, card_bytes):
        return None
    return "\n".join(
        [
            f"warning: micro-batches of {demand.batch_seconds:.1f} s need about {gib(as_it_is.card_bytes)} GiB of a "
            f"card; this one has {gib(card_bytes)} GiB, of which {gib(usable_bytes(card_bytes))} can be counted on.",
            *_rows(demand, [as_it_is, *others], card_bytes),
            _remedy(demand, [as_it_is, *others]),
        ]
    )


@contextlib.contextmanager
def explaining_out_of_memory(demand: Demand) -> Iterator[None]:
    """Turn what says that memory has run out into `OutOfMemory` with the plan's rows and the flag to change."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines()
        traceback.clear_frames(error.__traceback__)  # they hold the micro-batch's tensors
        error.__traceback__ = None
        message = _explanation(demand, said[0] if said else "no memory left")
    else:
        return
    raise OutOfMemory(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the card or of the host, has run out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)


def _explanation(demand: Demand, said: str) -> str:
    lines = [f"out of memory: {said}"]
    card_bytes = card_bytes_here()
    try:
        found = demand.needs(card_bytes or 0)
    except (MemoryError, RuntimeError):  # not even that
        found = []
    if found:
        where = "each card" if demand.workload.cuda else "memory for each rank, beside the program itself"
        lines.append(
            f"micro-batches of {demand.batch_seconds:.1f} s need about {gib(found[0].card_bytes)} GiB of {where}:"
        )
        lines += _rows(demand, found, card_bytes)
    lines.append(_remedy(demand, found))
    return "\n".join(lines)


def _rows(demand: Demand, found: list[Need], card_bytes: int | None) -> list[str]:
    return table(found, card_bytes=card_bytes, num_ranks=demand.num_ranks)


def _remedy(demand: Demand, found: list[Need]) -> str:
    """The flags that would help, with what they would bring where that is known."""
    as_it_is = found[0] if found else None
    longest = int(as_it_is.largest_seconds) if as_it_is else 0
    remedies = [f"lower {demand.flag}" + (f": up to {longest:,} s fit" if longest else "")]
    if not demand.workload.gradient_checkpointing:
        longest = int(found[-1].largest_seconds) if found else 0
        remedies.append("add --gradient_checkpointing" + (f": then up to {longest:,} s fit" if longest else ""))
    remedies.append(
        "choose another --deepspeed configuration (`trainer plan` compares them), or shorten utterances with "
        "--max_duration_in_seconds"
    )
    return "to change: " + "; ".join(remedies) + "."
