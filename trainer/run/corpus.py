"""From the data flags to indexes of utterances and streams of batches."""

import contextlib
import fcntl
import os
import sys
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.arguments import PretrainArguments
from trainer.data.audio import SAMPLE_RATE
from trainer.data.batching import Batching, Cursor, shard_validation, validation_batches
from trainer.data.collate import Batch, MaskSettings
from trainer.data.frames import FrameGeometry
from trainer.data.index import AudioIndex, Skipped, build_index, filter_by_duration, split_validation
from trainer.data.loader import UtteranceDataset, Window, training_windows, validation_loader
from trainer.errors import UserError

_FEWEST_FRAMES = 2  # one to predict and one to tell it from


class Corpus(NamedTuple):
    """Utterances to train and to validate on, and the files that were left out."""

    train: AudioIndex
    validation: AudioIndex
    skipped: list[Skipped]
    num_too_short: int


def index_cache_folder(arguments: PretrainArguments) -> str:
    """Where audio indexes are kept: below `--cache_dir`, or the user's cache folder."""
    base = arguments.cache_dir or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "speech-pretrainer"
    )
    return os.path.join(base, "audio-index")


def open_corpus(arguments: PretrainArguments, geometry: FrameGeometry, progress: bool) -> Corpus:
    """Index (or read the index of) the data, without needing a process group.

    Every rank calls it; the first one on a machine builds, the others wait for the file. Raises `UserError`.
    """
    assert arguments.dataset_name is not None  # the arguments' own rule
    index, skipped = _open_folder("dataset_name", arguments.dataset_name, arguments, progress)
    shortest = max(arguments.min_duration_in_seconds, geometry.min_samples(_FEWEST_FRAMES) / SAMPLE_RATE)
    index, num_too_short = filter_by_duration(index, shortest)
    if arguments.validation_dataset_name is None:
        train, validation = split_validation(index, arguments.validation_split_percentage, arguments.seed)
    else:
        train = index
        validation, more_skipped = _open_folder(
            "validation_dataset_name", arguments.validation_dataset_name, arguments, progress
        )
        validation, _ = filter_by_duration(validation, shortest)
        skipped = skipped + more_skipped
    return Corpus(train, validation, skipped, num_too_short)


def _open_folder(
    flag: str, folder: str, arguments: PretrainArguments, progress: bool
) -> tuple[AudioIndex, list[Skipped]]:
    cache = index_cache_folder(arguments)
    with _one_process_at_a_time(cache):
        return build_index(folder, cache, progress, rebuild=arguments.overwrite_cache, flag=flag)


@contextlib.contextmanager
def _one_process_at_a_time(folder: str) -> Iterator[None]:
    """Hold a lock file in `folder`, so that ranks on one machine do not read the same headers at once."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, ".lock"), "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"cache_dir ({folder}) cannot be written: {error.strerror}; set --cache_dir.") from error
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: then ranks do the same work side by side
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fingerprint(corpus: Corpus) -> int:
    """A number below 2^20 that differs, most likely, between corpora of other utterances, lengths or splits."""
    parts = (part for index in (corpus.train, corpus.validation) for part in (index.ids, index.num_samples))
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part.tobytes(), checksum)
    return checksum % 2**20


def describe(corpus: Corpus) -> str:
    """One line for a person."""
    text = (
        f"data: {len(corpus.train):,} utterances ({corpus.train.hours:.2f} h) to train on, "
        f"{len(corpus.validation):,} ({corpus.validation.hours:.2f} h) to validate on"
    )
    if corpus.num_too_short:
        text += f"; {corpus.num_too_short:,} too short"
    if corpus.skipped:
        reasons = Counter(item.reason for item in corpus.skipped)
        text += f"; {len(corpus.skipped):,} files skipped ({', '.join(f'{k}: {v:,}' for k, v in reasons.items())})"
    return text


def batching_of(arguments: PretrainArguments, index: AudioIndex) -> Batching:
    """What decides the training batches."""
    return Batching(
        num_samples=index.num_samples,
        max_batch_samples=_batch_samples(arguments, arguments.per_device_train_batch_size),
        max_batch_size=arguments.per_device_train_batch_size,
        max_samples=round(arguments.max_duration_in_seconds * SAMPLE_RATE),
        seed=arguments.seed,
    )


def _batch_samples(arguments: PretrainArguments, batch_size: int) -> int:
    seconds = arguments.max_batch_seconds or batch_size * arguments.max_duration_in_seconds
    return round(seconds * SAMPLE_RATE)


def training_stream(
    arguments: PretrainArguments,
    index: AudioIndex,
    geometry: FrameGeometry,
    masks: MaskSettings,
    cursor: Cursor,
    rank: int,
    world_size: int,
    pin_memory: bool,
) -> Generator[Window, None, None]:
    """This rank's endless stream of windows from `cursor` on."""
    return training_windows(
        UtteranceDataset(index, geometry, masks, arguments.seed, random_crop=True),
        batching_of(arguments, index),
        cursor,
        rank,
        world_size,
        arguments.gradient_accumulation_steps,
        arguments.num_workers,
        pin_memory,
    )


def validation_stream(
    arguments: PretrainArguments,
    index: AudioIndex,
    geometry: FrameGeometry,
    masks: MaskSettings,
    rank: int,
    world_size: int,
    pin_memory: bool,
) -> Iterator[tuple[Batch, bool]]:
    """This rank's share of the validation batches, with fixed crops and masks."""
    batch_size = arguments.per_device_eval_batch_size
    specs = validation_batches(
        index.num_samples,
        _batch_samples(arguments, batch_size),
        batch_size,
        round(arguments.max_duration_in_seconds * SAMPLE_RATE),
    )
    dataset = UtteranceDataset(index, geometry, masks, arguments.seed, random_crop=False)
    return validation_loader(dataset, shard_validation(specs, rank, world_size), arguments.num_workers, pin_memory)


class SkippedLog:
    """`skipped.tsv`: each file that was left out, once, with the reason; ranks append to the same file.

    `failure` keeps the first `OSError` for a moment when all ranks can learn of it: one rank alone meets a broken file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure: OSError | None = None
        self.seen = self._listed()

    def _listed(self) -> set[str]:
        if not self.path.exists():
            return set()
        return {line.split("\t")[0] for line in self.path.read_text(encoding="utf-8").splitlines()}

    def add(self, items: Iterable[Skipped]) -> None:
        """List the files that are not listed yet."""
        for item in items:
            name = item.path.encode("unicode_escape").decode("ascii")  # a name may hold a tab or a newline
            if name in self.seen:
                continue
            try:
                self._append(name, item.reason)
            except OSError as error:
                self.failure = self.failure or error
            self.seen.add(name)

    def _append(self, name: str, reason: str) -> None:
        self.seen |= self._listed()  # another rank may have met the file
        if name not in self.seen:
            print(f"skipped {name}: {reason}", file=sys.stderr)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{name}\t{reason}\n")

    def raise_failure(self) -> None:
        """Raise the `OSError` of a file that could not be listed, if there was one."""
        if self.failure is not None:
            raise self.failure
