"""Which configurations fit a card, and how many seconds of audio each takes."""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.memory.activations import Activations, Workload, count_activations, model_numbers
from trainer.memory.states import ModelNumbers, StateBytes, deepspeed_states, plain_states

# Utterances per micro-batch that are counted. The peak is the largest, over the moments of forward and backward, of
# something that grows linearly with the number of utterances (of one length): a convex function of it. Between the two
# a straight line is therefore never below it. It is above where two moments compete, which was seen for plain PyTorch
# with checkpointing, where autocast's copies of the weights weigh more than one utterance, and for nothing else.
_COUNTED = (1, 32)

# Left free on a card: CUDA's context, cuBLAS, cuDNN and NCCL, which the framework's allocator does not see, and what
# fragmentation leaves unused between tensors whose sizes change from batch to batch.
_CONTEXT_BYTES = 1 << 30
_FRAGMENTATION = 0.05


def usable_bytes(card_bytes: int) -> int:
    """What of a card's memory tensors can take."""
    return max(0, int(card_bytes * (1 - _FRAGMENTATION)) - _CONTEXT_BYTES)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Peak of the activations over the number of utterances in a micro-batch."""

    numbers: Sequence[int]
    peaks: Sequence[Activations]

    def at(self, number: float) -> Activations:
        """Straight lines between what was counted, and on beyond it."""
        right = min(max(bisect.bisect_left(self.numbers, number), 1), len(self.numbers) - 1)
        first, last = self.numbers[right - 1], self.numbers[right]
        share = (number - first) / (last - first)
        before, after = (dataclasses.astuple(self.peaks[index]) for index in (right - 1, right))
        parts = [a + (b - a) * share for a, b in zip(before, after, strict=True)]
        # a part that another moment's peak does without falls below nothing far beyond what was counted; the sum holds
        shown = [max(0.0, part) for part in parts]
        return Activations(*(round(part * sum(parts) / max(sum(shown), 1.0)) for part in shown))

    def largest(self, available: int) -> float:
        """The most utterances whose activations take at most `available` bytes; 0 where not even one does."""
        totals = [peak.total for peak in self.peaks]
        if available < totals[0]:
            return 0.0
        right = min(max(bisect.bisect_left(totals, available), 1), len(totals) - 1)
        share = (available - totals[right - 1]) / (totals[right] - totals[right - 1])
        return self.numbers[right - 1] + share * (self.numbers[right] - self.numbers[right - 1])


@dataclasses.dataclass(frozen=True)
class Need:
    """What one configuration takes on each card with micro-batches of so many seconds, and what it could take."""

    configuration: str
    gradient_checkpointing: bool
    states: StateBytes
    activations: Activations
    largest_seconds: float
    """Longest micro-batch that fits; 0: not even one utterance does."""

    @property
    def card_bytes(self) -> int:
        return self.states.card + max(self.activations.total, self.states.only_in_step)


def needs(
    workload: Workload,
    ds_configs: Mapping[str, dict[str, Any] | None],
    *,
    num_ranks: int,
    batch_seconds: float,
    card_bytes: int,
    checkpointing: Sequence[bool] = (False, True),
) -> list[Need]:
    """Every configuration (None: plain PyTorch) without and with checkpointing; each curve is counted once."""
    model = model_numbers(workload)
    curves: dict[tuple[bool, bool], Curve] = {}
    found = []
    for name, ds_config in ds_configs.items():
        states = _states(model, num_ranks, ds_config, bf16=workload.bf16)
        for checkpoints in checkpointing:
            key = (ds_config is not None, checkpoints)
            if key not in curves:
                own = dataclasses.replace(workload, casts_model=key[0], gradient_checkpointing=checkpoints)
                curves[key] = Curve(_COUNTED, count_activations(own, _COUNTED))
            activations = curves[key].at(batch_seconds / workload.utterance_seconds)
            available = usable_bytes(card_bytes) - states.card
            largest = 0.0 if available < states.only_in_step else curves[key].largest(available)
            found.append(Need(name, checkpoints, states, activations, largest * workload.utterance_seconds))
    return found


def _states(model: ModelNumbers, num_ranks: int, ds_config: dict[str, Any] | None, *, bf16: bool) -> StateBytes:
    if ds_config is None:
        return plain_states(model)
    return deepspeed_states(model, num_ranks, ds_config, bf16=bf16)
