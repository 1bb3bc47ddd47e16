"""Batches decoded in worker processes, ahead of the update that needs them."""

import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data.audio import SILENT, AudioError, Place, decode, has_sound, normalise
from trainer.data.batching import Batching, BatchSpec, Cursor, Take, windows
from trainer.data.collate import Batch, MaskSettings, collate, crop_purpose
from trainer.data.frames import FrameGeometry
from trainer.data.index import AudioIndex, DataError, Skipped
from trainer.data.masking import utterance_rng
from trainer.data.rows import SILENT_IN_PART
from trainer.data.workers import init_worker, signals_blocked, start_fork_server

_MAX_REPLACEMENTS = 100
_ONLY = Take(number=0, of=1)


class UtteranceDataset(Dataset[Batch]):
    """``dataset[spec]`` decodes, crops and masks the utterances of one ``BatchSpec``."""

    def __init__(
        self,
        index: AudioIndex,
        geometry: FrameGeometry,
        mask_settings: MaskSettings,
        seed: int,
        random_crop: bool,
        multiple_of: int = 1,
    ) -> None:
        """Crops start anywhere, by (seed, epoch, utterance), with ``random_crop``; otherwise they are the middle.

        Batches that need padding are padded to a multiple of ``multiple_of`` samples.
        """
        self.index = index
        self.geometry = geometry
        self.mask_settings = mask_settings
        self.seed = seed
        self.random_crop = random_crop
        self.multiple_of = multiple_of

    def __getitem__(self, spec: BatchSpec) -> Batch:
        """Decode one batch.

        An utterance that cannot be decoded is left out and listed in ``skipped``. If none can, the next utterance of
        the index that is long enough stands in for them, or where there is none the longest of the shorter ones.

        Raises:
            DataError: nor can any of the 100 utterances after the first one.
        """
        skipped: list[Skipped] = []
        takes = spec.takes or (_ONLY,) * len(spec.rows)
        decoded = self._decode_rows(spec, zip(spec.rows, takes, strict=True), skipped)
        if not decoded:
            attempts = (self._decode_rows(spec, [(row, _ONLY)], skipped) for row in self._replacements(spec))
            decoded = next(filter(None, attempts), [])
        if not decoded:
            raise DataError(
                f"dataset_name ({self.index.root}) must hold audio that can be decoded; {len(skipped)} files in a row "
                f"cannot. Last: {skipped[-1].path} ({skipped[-1].reason})."
            )
        batch = collate(
            [waveform for _, _, waveform in decoded],
            [int(self.index.ids[row]) for row, _, _ in decoded],
            spec.epoch,
            self.seed,
            self.geometry,
            self.mask_settings,
            [take.number for _, take, _ in decoded],
            self.multiple_of,
        )
        return batch._replace(skipped=tuple(skipped))

    def _decode_rows(
        self, spec: BatchSpec, rows: Iterable[tuple[int, Take]], skipped: list[Skipped]
    ) -> list[tuple[int, Take, npt.NDArray[np.float32]]]:
        """Row, take and waveform of each that decodes; the others are appended to ``skipped``."""
        decoded = []
        for row, take in rows:
            num_samples = min(int(self.index.num_samples[row]), spec.num_samples)
            place = self.index.place(row)
            try:
                waveform = decode(place, self._crop_start(spec, row, take, num_samples), num_samples)
            except AudioError as error:
                skipped.append(Skipped(self.index.path(row), _reason(place, error)))
            else:
                decoded.append((row, take, normalise(waveform)))
        return decoded

    def _crop_start(self, spec: BatchSpec, row: int, take: Take, num_samples: int) -> int:
        """Several crops of one utterance start in equal shares of it, one in each."""
        room = int(self.index.num_samples[row]) - num_samples
        if not self.random_crop:
            return room // 2
        lowest, end = ((room + 1) * number // take.of for number in (take.number, take.number + 1))
        rng = utterance_rng(self.seed, spec.epoch, int(self.index.ids[row]), crop_purpose(take.number))
        return int(rng.integers(lowest, max(end, lowest + 1)))

    def _replacements(self, spec: BatchSpec) -> Iterator[int]:
        following = (np.arange(len(self.index)) + spec.rows[0]) % len(self.index)
        # Those that are long enough in the order of the index, then the others, longest first.
        lacking = np.maximum(spec.num_samples - self.index.num_samples[following], 0)
        following = following[np.argsort(lacking, kind="stable")]
        tried = set(spec.rows)
        return itertools.islice((row for row in following.tolist() if row not in tried), _MAX_REPLACEMENTS)


def _reason(place: Place, error: AudioError) -> str:
    """Why a crop is left out: silence says something about the file only where all of it is silent."""
    if error.reason != SILENT:
        return error.reason
    try:
        return SILENT_IN_PART if has_sound(place) else SILENT
    except AudioError as worse:
        return worse.reason


class Window(NamedTuple):
    """One rank's micro-batches of one update, and where the stream goes on after it."""

    batches: list[Batch]
    next_cursor: Cursor


def training_windows(
    dataset: UtteranceDataset,
    batching: Batching,
    cursor: Cursor,
    rank: int,
    world_size: int,
    accumulation_steps: int,
    num_workers: int,
    pin_memory: bool,
) -> Generator[Window, None, None]:
    """Endless stream of this rank's windows from ``cursor`` on, see ``batching.windows``.

    Workers decode ahead across the borders of windows and epochs; what they deliver, and in which order, does not
    depend on ``num_workers`` (0 decodes in this process). Close the generator to stop them.

    Raises:
        DataError: from ``UtteranceDataset``; raised in a worker it arrives here under the same type.
    """
    stream = windows(batching, cursor, rank, world_size, accumulation_steps)
    ahead, current = itertools.tee(stream)  # the workers run ahead of the window put together here
    specs = itertools.chain.from_iterable(window.specs for window in ahead)
    batches = _load(dataset, specs, num_workers, pin_memory)
    for window in current:
        yield Window(list(itertools.islice(batches, accumulation_steps)), window.next_cursor)


def validation_loader(
    dataset: UtteranceDataset, sharded_specs: list[tuple[BatchSpec, bool]], num_workers: int, pin_memory: bool
) -> Iterator[tuple[Batch, bool]]:
    """This rank's validation batches, each with whether it counts, see ``batching.shard_validation``."""
    batches = _load(dataset, (spec for spec, _ in sharded_specs), num_workers, pin_memory)
    return zip(batches, (counts for _, counts in sharded_specs), strict=True)


def _load(dataset: UtteranceDataset, specs: Iterable[BatchSpec], num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    loader = DataLoader(
        dataset,
        sampler=specs,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_identity,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
        multiprocessing_context="forkserver" if num_workers else None,
    )
    if num_workers:
        start_fork_server(preload=__name__)
    with signals_blocked():  # workers start here
        batches = iter(loader)
    try:
        yield from map(_own, batches)
    except DataError as error:  # a worker's arrives with its whole traceback as the message
        raise DataError(str(error).strip().rsplit(f"{DataError.__name__}: ", 1)[-1]) from None
    finally:
        if num_workers:
            # Not left to __del__ (torch 2.13): an error raised for a worker is part of a reference cycle, and the
            # garbage collector may end the queues before the workers were told to stop, which then takes 5 s for each.
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _identity(batch: Any) -> Any:
    return batch


def _own(batch: Batch) -> Batch:
    """A copy of tensors that a worker shares: each keeps a file open, and a long window would run out of them."""
    return Batch._make(x.clone() if isinstance(x, torch.Tensor) and x.is_shared() else x for x in batch)
