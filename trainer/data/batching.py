"""Which utterances share a batch, and which batches a rank sees: pure functions of numbers.

A batch holds utterances of similar length, all cropped to its shortest, so that nothing is padded. Batches do not
depend on the number of ranks: one global stream is dealt out to them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_JITTER = 0.05
# Rows are sorted by length times a random 1 .. 1 + this, so that utterances within 5 % of each other's length change
# places from epoch to epoch. Costs about 2 % of the audio.
_MIN_KEPT = 0.8
# A row that would crop the longest of its batch to less than this fraction starts a new batch.


class BatchSpec(NamedTuple):
    """One batch: utterances by row number, each cropped to ``num_samples`` samples."""

    epoch: int
    rows: tuple[int, ...]
    num_samples: int


class Cursor(NamedTuple):
    """A place in the endless stream of batches: the next one is number ``batch`` of ``epoch``."""

    epoch: int
    batch: int


class WindowSpec(NamedTuple):
    """One rank's micro-batches of one update, and where the stream goes on after it."""

    specs: tuple[BatchSpec, ...]
    next_cursor: Cursor


@dataclass(frozen=True, eq=False)
class Batching:
    """What decides the batches of every epoch. At least one row, every row at least one sample long."""

    num_samples: npt.NDArray[np.int64]
    """Length of each row in samples, shape [num_rows]."""
    max_batch_samples: int
    """Samples in one batch: rows times crop. A longer single row is cropped to it."""
    max_batch_size: int
    """Rows in one batch."""
    max_samples: int
    """Samples kept of one row."""
    seed: int


def epoch_batches(batching: Batching, epoch: int) -> list[BatchSpec]:
    """The batches of one epoch, in order. Every row is in exactly one of them."""
    rng = np.random.default_rng([batching.seed, epoch])
    lengths = _cropped(batching.num_samples, batching.max_samples, batching.max_batch_samples)
    # Products round the same on every CPU and the sort is stable: ranks on unlike machines agree on the order.
    jittered = lengths * (1.0 + _JITTER * rng.random(len(lengths)))
    order = np.argsort(-jittered, kind="stable")
    batches = _group(lengths, order, batching.max_batch_samples, batching.max_batch_size, epoch)
    return [batches[position] for position in rng.permutation(len(batches)).tolist()]


def windows(
    batching: Batching, cursor: Cursor, rank: int, world_size: int, accumulation_steps: int
) -> Iterator[WindowSpec]:
    """Endless stream of one rank's windows from ``cursor`` on, running on across the ends of epochs.

    A window is ``accumulation_steps * world_size`` batches in a row of the global stream; micro-batch m of rank r is
    number ``m * world_size + r`` of it. It therefore holds the same batches for every split of the same product, and
    starting again from ``next_cursor`` goes on as if there had been no stop.
    """
    epoch, position = cursor
    batches = epoch_batches(batching, epoch)
    while True:
        window: list[BatchSpec] = []
        while len(window) < accumulation_steps * world_size:
            if position >= len(batches):
                epoch, position = epoch + 1, 0
                batches = epoch_batches(batching, epoch)
            taken = batches[position : position + accumulation_steps * world_size - len(window)]
            window += taken
            position += len(taken)
        yield WindowSpec(tuple(window[rank::world_size]), Cursor(epoch, position))


def validation_batches(
    num_samples: npt.NDArray[np.int64], max_batch_samples: int, max_batch_size: int, max_samples: int
) -> list[BatchSpec]:
    """Every row once, longest first, always the same batches; the limits are those of ``Batching``."""
    lengths = _cropped(num_samples, max_samples, max_batch_samples)
    return _group(lengths, np.argsort(-lengths, kind="stable"), max_batch_samples, max_batch_size, epoch=0)


def shard_validation(batches: list[BatchSpec], rank: int, world_size: int) -> list[tuple[BatchSpec, bool]]:
    """One rank's share of the validation batches, equally many on every rank.

    Returns:
        Pairs of a batch and whether it counts. Where the batches do not divide evenly the last one is repeated, and
        the repeats do not count.
    """
    padding = -len(batches) % world_size
    padded = [(spec, True) for spec in batches] + [(spec, False) for spec in batches[-1:] * padding]
    return padded[rank::world_size]


def _cropped(num_samples: npt.NDArray[np.int64], max_samples: int, max_batch_samples: int) -> npt.NDArray[np.int64]:
    return np.minimum(num_samples, min(max_samples, max_batch_samples))


def _group(
    lengths: npt.NDArray[np.int64], order: npt.NDArray[np.intp], max_batch_samples: int, max_batch_size: int, epoch: int
) -> list[BatchSpec]:
    """Cut the rows, in the given order (about longest first), into batches within the limits."""
    batches = []
    rows: list[int] = []
    longest = shortest = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        crop, reach = min(shortest, length), max(longest, length)
        full = len(rows) == max_batch_size or (len(rows) + 1) * crop > max_batch_samples or crop < _MIN_KEPT * reach
        if rows and full:
            batches.append(BatchSpec(epoch, tuple(rows), shortest))
            rows = []
        if not rows:
            crop = reach = length
        rows.append(row)
        shortest, longest = crop, reach
    if rows:
        batches.append(BatchSpec(epoch, tuple(rows), shortest))
    return batches
