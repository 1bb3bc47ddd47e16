"""Which utterances share a batch, and which batches a rank sees: pure functions of numbers.

A batch holds utterances of similar length, all cropped to its shortest, so that nothing is padded; or, with
``no_crop``, padded to its longest. Batches do not depend on the number of ranks: one global stream is dealt out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from trainer.data.sampling import num_takes

_Lengths = npt.NDArray[np.int64]

_JITTER = 0.05
# Rows are sorted by length times a random 1 .. 1 + this, so that utterances within 5 % of each other's length change
# places from epoch to epoch. Costs about 2 % of the audio, or as much padding.
_MIN_KEPT = 0.8
# A row that would crop the longest of its batch to less than this fraction starts a new batch.
_MAX_PADDING = 0.05
# A row with which more than this fraction of its batch would be padding starts a new batch.
_STRETCH = 4096
# Rows in order of length are grouped in stretches of this many, all stretches in step: 0.2 s for a million rows, where
# one after the other takes 1 s and more. The last batch of a stretch may be smaller than the limits allow.


class Take(NamedTuple):
    """Number ``number`` (from 0) of the ``of`` crops that an epoch takes of one row."""

    number: int
    of: int


class BatchSpec(NamedTuple):
    """One batch: utterances by row number, each cropped to ``num_samples`` samples where it is longer."""

    epoch: int
    rows: tuple[int, ...]
    num_samples: int
    takes: tuple[Take, ...] = ()
    """Which crop of its row each is; empty where an epoch takes no more than one of any of them."""


class Cursor(NamedTuple):
    """A place in the endless stream of batches: the next one is number ``batch`` of ``epoch``."""

    epoch: int
    batch: int


class WindowSpec(NamedTuple):
    """One rank's micro-batches of one update, and where the stream goes on after it."""

    specs: tuple[BatchSpec, ...]
    next_cursor: Cursor


@dataclass(frozen=True)
class Limits:
    """How large a batch may be."""

    max_batch_samples: int
    """Samples in one batch, padding included: rows times length. A longer single row is cropped to it."""
    max_batch_size: int
    """Rows in one batch."""
    max_samples: int
    """Samples kept of one row."""
    no_crop: bool = False
    """Rows come whole, up to ``max_samples``, and are padded to the longest of the batch."""
    multiple_of: int = 1
    """Samples that a padded batch is a multiple of, at most ``max_batch_samples``; 1 without ``no_crop``."""

    @property
    def max_length(self) -> int:
        """Most samples that a batch takes of one row."""
        return min(self.max_samples, self.max_batch_samples // self.multiple_of * self.multiple_of)


@dataclass(frozen=True, eq=False)
class Batching:
    """What decides the batches of every epoch. At least one row, every row at least one sample long."""

    num_samples: _Lengths
    """Length of each row in samples, shape [num_rows]."""
    limits: Limits
    seed: int
    expected_takes: npt.NDArray[np.float64] | None = None
    """How often an epoch takes each row, on average over the epochs, shape [num_rows]; None: once. See sampling.py."""


@dataclass(frozen=True, eq=False)
class Batches(Sequence[BatchSpec]):
    """The batches of one epoch, in order; kept as arrays, some 20 bytes an item."""

    epoch: int
    rows: npt.NDArray[np.intp]
    """Row of each item, batch by batch in order of length, shape [num_items]."""
    first: npt.NDArray[np.intp]
    """Item at which each batch begins, shape [num_batches]."""
    sizes: npt.NDArray[np.intp]
    """Items of each batch, shape [num_batches]."""
    num_samples: _Lengths
    """Length of each batch, shape [num_batches]."""
    takes: npt.NDArray[np.int32] | None = None
    """Number and count of each item's crops, shape [num_items, 2]; None: one of each."""

    def __len__(self) -> int:
        return len(self.first)

    @overload
    def __getitem__(self, position: int) -> BatchSpec: ...

    @overload
    def __getitem__(self, position: slice) -> list[BatchSpec]: ...

    def __getitem__(self, position: int | slice) -> BatchSpec | list[BatchSpec]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        items = slice(self.first[position], self.first[position] + self.sizes[position])
        takes: tuple[Take, ...] = ()
        if self.takes is not None and (self.takes[items, 1] > 1).any():
            takes = tuple(Take(*pair) for pair in self.takes[items].tolist())
        return BatchSpec(self.epoch, tuple(self.rows[items].tolist()), int(self.num_samples[position]), takes)


def epoch_batches(batching: Batching, epoch: int) -> Batches:
    """The batches of one epoch, in order. Every row is in exactly one of them, or as often as it is to be taken."""
    rng = np.random.default_rng([batching.seed, epoch])
    rows, takes = _items(batching, epoch)
    lengths = np.minimum(batching.num_samples, batching.limits.max_length)[rows]
    # Products round the same on every CPU and the sort is stable: ranks on unlike machines agree on the order.
    jittered = lengths * (1.0 + _JITTER * rng.random(len(lengths)))
    order = np.argsort(-jittered, kind="stable")
    first, sizes, num_samples = _group(lengths[order], batching.limits)
    shuffled = rng.permutation(len(first))
    return Batches(
        epoch,
        rows[order],
        first[shuffled],
        sizes[shuffled],
        num_samples[shuffled],
        None if takes is None else takes[order],
    )


def _items(batching: Batching, epoch: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int32] | None]:
    """What an epoch consists of: the row of each item, and which of the row's crops it is."""
    rows = np.arange(len(batching.num_samples))
    if batching.expected_takes is None:
        return rows, None
    counts = num_takes(batching.expected_takes, batching.seed, epoch)
    if (counts == 1).all():
        return rows, None
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(rows, counts), np.stack([numbers, np.repeat(counts, counts)], axis=1).astype(np.int32)


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


def validation_batches(num_samples: _Lengths, limits: Limits) -> list[BatchSpec]:
    """Every row once, longest first, always the same batches."""
    lengths = np.minimum(num_samples, limits.max_length)
    order = np.argsort(-lengths, kind="stable")
    return list(Batches(0, order, *_group(lengths[order], limits)))


def shard_validation(batches: list[BatchSpec], rank: int, world_size: int) -> list[tuple[BatchSpec, bool]]:
    """One rank's share of the validation batches, equally many on every rank.

    Returns:
        Pairs of a batch and whether it counts. Where the batches do not divide evenly the last one is repeated, and
        the repeats do not count.
    """
    padding = -len(batches) % world_size
    padded = [(spec, True) for spec in batches] + [(spec, False) for spec in batches[-1:] * padding]
    return padded[rank::world_size]


def _group(lengths: _Lengths, limits: Limits) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], _Lengths]:
    """Cut rows, given in order of about falling length, into batches within the limits.

    Returns:
        First row, number of rows and length in samples of each batch.
    """
    if len(lengths) == 0:
        return np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, np.int64)
    first = np.flatnonzero(_starts(lengths, limits))
    sizes = np.diff(first, append=len(lengths))
    extent = np.maximum if limits.no_crop else np.minimum
    return first, sizes, extent.reduceat(lengths, first)


def _starts(lengths: _Lengths, limits: Limits) -> npt.NDArray[np.bool_]:
    """True where a batch begins: at each row that no longer fits the batch of those before it, shape [num_rows]."""
    num_steps = min(len(lengths), _STRETCH)
    num_stretches = -(-len(lengths) // num_steps)
    grid = np.ones(num_stretches * num_steps, dtype=np.int64)
    grid[: len(lengths)] = lengths
    grid = np.ascontiguousarray(grid.reshape(num_stretches, num_steps).T)  # [num_steps, num_stretches]
    starts = np.ones(grid.shape, dtype=np.bool_)
    size = np.ones(num_stretches, dtype=np.int64)
    shortest = longest = total = grid[0]
    for step in range(1, num_steps):
        length = grid[step]
        shortest, longest = np.minimum(shortest, length), np.maximum(longest, length)
        size, total = size + 1, total + length
        if limits.no_crop:
            width = -(-longest // limits.multiple_of) * limits.multiple_of
            full = (size * width > limits.max_batch_samples) | (total < (1 - _MAX_PADDING) * (size * longest))
        else:
            full = (size * shortest > limits.max_batch_samples) | (shortest < _MIN_KEPT * longest)
        full |= size > limits.max_batch_size
        starts[step] = full
        size = np.where(full, 1, size)
        shortest, longest, total = (np.where(full, length, value) for value in (shortest, longest, total))
    return starts.T.ravel()[: len(lengths)]
