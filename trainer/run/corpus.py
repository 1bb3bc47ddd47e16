"""From the data flags to indexes of utterances and streams of batches."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import sys
import time
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.arguments import PretrainArguments
from trainer.data.audio import SAMPLE_RATE
from trainer.data.batching import Batching, Cursor, Limits, shard_validation, validation_batches
from trainer.data.collate import Batch, MaskSettings
from trainer.data.frames import FrameGeometry
from trainer.data.index import (
    AudioIndex,
    build_index,
    built_since,
    concatenate,
    filter_by_duration,
    find_index,
    split_validation,
)
from trainer.data.loader import UtteranceDataset, Window, training_windows, validation_loader
from trainer.data.rows import Request, Skipped
from trainer.data.sampling import tag_factors, takes_by_length
from trainer.errors import CannotWrite, UserError
from trainer.run.skipped import count_reasons, write_skipped

_FEWEST_FRAMES = 2  # one to predict and one to tell it from

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_STARTED = time.time()


class Corpus(NamedTuple):
    """Utterances to train and to validate on, and the files that were left out."""

    train: AudioIndex
    validation: AudioIndex
    skipped: list[Skipped]
    num_too_short: int

    @property
    def num_files(self) -> int:
        """All that were found, usable or not."""
        return len(self.train) + len(self.validation) + len(self.skipped) + self.num_too_short


def index_cache_folder(arguments: PretrainArguments) -> str:
    """Where audio indexes are kept: below `--cache_dir`, or the user's cache folder."""
    base = arguments.cache_dir or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "speech-pretrainer"
    )
    return os.path.join(base, "audio-index")


def open_corpus(arguments: PretrainArguments, geometry: FrameGeometry, progress: bool) -> Corpus:
    """Index (or read the index of) the data, without needing a process group.

    Every rank calls it before they meet, so none waits in a collective while another reads headers. Raises `UserError`.
    """
    index, skipped = open_sources(arguments, "dataset_name", progress)
    shortest = max(arguments.min_duration_in_seconds, geometry.min_samples(_FEWEST_FRAMES) / SAMPLE_RATE)
    index, num_too_short = filter_by_duration(index, shortest)
    if arguments.validation_dataset_name is None:
        train, validation = split_validation(index, arguments.validation_split_percentage, arguments.seed)
    else:
        train = index
        validation, more_skipped = open_sources(arguments, "validation_dataset_name", progress)
        validation, more_too_short = filter_by_duration(validation, shortest)
        skipped, num_too_short = skipped + more_skipped, num_too_short + more_too_short
    if arguments.sampling_alpha < 1 and len(np.unique(train.tags)) < 2:
        raise UserError(
            f"sampling_alpha ({arguments.sampling_alpha:g}) must be 1 for audio of one language from one source, as "
            f"{train.root} is: there is nothing to balance; leave --sampling_alpha out, or name --language_column_name."
        )
    return Corpus(train, validation, skipped, num_too_short)


def open_sources(arguments: PretrainArguments, flag: str, progress: bool) -> tuple[AudioIndex, list[Skipped]]:
    """The utterances of all sources that a flag names, and the files that cannot be used.

    Raises:
        UserError: a source is not there or holds no audio, or more than `--max_skipped_fraction` cannot be used.
    """
    opened = [_open_source(request, arguments, progress) for request in requests_of(arguments, flag)]
    index = concatenate([each for each, _ in opened])
    skipped = [item for _, items in opened for item in items]
    num_files = len(index) + len(skipped)
    if len(skipped) > arguments.max_skipped_fraction * num_files:
        listed = list_skipped(arguments, flag, skipped)
        raise UserError(
            f"max_skipped_fraction ({arguments.max_skipped_fraction:g}) must not be exceeded: {len(skipped):,} of "
            f"{num_files:,} files of {flag} cannot be used ({count_reasons(skipped)}); they are listed in {listed}. "
            "Mend or remove them, or raise --max_skipped_fraction."
        )
    return index, skipped


def requests_of(arguments: PretrainArguments, flag: str) -> list[Request]:
    """The sources that `dataset_name` or `validation_dataset_name` stands for."""
    names: list[str] = getattr(arguments, flag)
    configs, splits = arguments.dataset_config_names, arguments.dataset_split_names
    if flag == "dataset_name" and (configs or splits):
        pairs = itertools.zip_longest(configs or [], splits or [])
        parts = [(names[0], config, split) for config, split in pairs]
    else:
        parts = [_parts(name) for name in names]
    return [
        Request(
            name, config, split, arguments.audio_column_name, arguments.language_column_name, arguments.cache_dir, flag
        )
        for name, config, split in parts
    ]


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """NAME:CONFIG:SPLIT taken apart; a path may hold colons itself."""
    if os.path.exists(name) or ":" not in name:
        return name, None, None
    name, config, split = [*name.split(":", 2), ""][:3]
    return name, config or None, split or None


def _open_source(request: Request, arguments: PretrainArguments, progress: bool) -> tuple[AudioIndex, list[Skipped]]:
    """Only the first process builds an index that is missing or out of date; others wait for it, then read it."""
    cache = index_cache_folder(arguments)
    if not arguments.overwrite_cache and (found := find_index(request, cache)) is not None:
        return found
    with _one_process_at_a_time(cache, progress):
        # Another rank of this run may just have done it.
        rebuild = arguments.overwrite_cache and not built_since(request, cache, _STARTED)
        try:
            return build_index(request, cache, progress, rebuild, arguments.preprocessing_num_workers)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise CannotWrite(
                f"the index in {cache} cannot be written: {os.strerror(error.errno)}. Make room there or set "
                "--cache_dir; the same command goes on where this one was."
            ) from error


@contextlib.contextmanager
def _one_process_at_a_time(folder: str, progress: bool) -> Iterator[None]:
    """Hold a lock file in `folder`, so that ranks, and runs on a cluster, do not read the same headers at once."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, ".lock"), "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"cache_dir ({folder}) cannot be written: {error.strerror}; set --cache_dir.") from error
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: then ranks do the same work side by side
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress:
                    print(f"waiting for another process that is building an index in {folder}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def list_skipped(arguments: PretrainArguments, flag: str, skipped: Iterable[Skipped]) -> Path:
    """Write the files that cannot be used to a `skipped.tsv` beside the index; returns where. Raises `UserError`."""
    names = "\n".join(getattr(arguments, flag))
    folder = Path(index_cache_folder(arguments)) / hashlib.sha256(os.fsencode(names)).hexdigest()[:16]
    try:
        return write_skipped(folder, skipped)
    except OSError as error:
        raise UserError(f"cache_dir ({folder}) cannot be written: {error.strerror}; set --cache_dir.") from error


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
        text += f"; {len(corpus.skipped):,} files skipped ({count_reasons(corpus.skipped)})"
    return text


def batching_of(arguments: PretrainArguments, index: AudioIndex) -> Batching:
    """What decides the training batches."""
    limits = _limits(arguments, arguments.per_device_train_batch_size)
    return Batching(
        num_samples=index.num_samples,
        limits=limits,
        seed=arguments.seed,
        expected_takes=_expected_takes(arguments, index, limits.max_length),
    )


def _limits(arguments: PretrainArguments, batch_size: int) -> Limits:
    seconds = arguments.max_batch_seconds or batch_size * arguments.max_duration_in_seconds
    return Limits(
        max_batch_samples=round(seconds * SAMPLE_RATE),
        max_batch_size=batch_size,
        max_samples=round(arguments.max_duration_in_seconds * SAMPLE_RATE),
        no_crop=arguments.no_crop,
        multiple_of=arguments.pad_to_multiple_of or 1,
    )


def _expected_takes(arguments: PretrainArguments, index: AudioIndex, max_length: int) -> npt.NDArray[np.float64] | None:
    """How often an epoch takes each utterance on average; None for once each."""
    takes = np.ones(len(index))
    if not arguments.one_crop_per_utterance:
        takes = takes_by_length(index.num_samples, max_length)
    alpha = arguments.sampling_alpha
    if alpha < 1:
        taken = takes * np.minimum(index.num_samples, max_length)
        takes *= tag_factors(index.num_samples, taken, index.tags, index.tag_sources, alpha)[index.tags]
    return None if (takes == 1).all() else takes


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
        UtteranceDataset(
            index, geometry, masks, arguments.seed, random_crop=True, multiple_of=arguments.pad_to_multiple_of or 1
        ),
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
    specs = validation_batches(index.num_samples, _limits(arguments, arguments.per_device_eval_batch_size))
    dataset = UtteranceDataset(
        index, geometry, masks, arguments.seed, random_crop=False, multiple_of=arguments.pad_to_multiple_of or 1
    )
    return validation_loader(dataset, shard_validation(specs, rank, world_size), arguments.num_workers, pin_memory)
