"""What the loader delivers alone, beside `datasets` and the stock recipe's cached floats; and whether its memory grows.

    python tests/benchmarks/loader.py [--minutes 60] [--num_rounds 5] [--memory_batches 10000]

The corpus is speech of tests/corpus put together anew: utterances of about 12 s, at most 30 s, as in LibriSpeech, the
same in every format. All rows run in one process, one after the other in every round, and count seconds of audio in
batches of 87.5 s, crops of at most 15.6 s, per second of the processor: other programs on the machine change little.

Ours opens, seeks, decodes the crop, normalises it, draws masks and negatives and stacks the batch; `datasets` and the
stock recipe's floats get by without masks and negatives.
"""

import argparse
import io
import itertools
import os
import platform
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import soundfile
from transformers import Wav2Vec2FeatureExtractor

from trainer.data.audio import SAMPLE_RATE, decode, read_num_samples
from trainer.data.batching import Batching, Cursor, Limits, epoch_batches
from trainer.data.collate import MaskSettings
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.data.index import AudioIndex, build_index
from trainer.data.loader import UtteranceDataset, training_windows

CORPUS = Path(__file__).parents[1] / "corpus"
LIMITS = Limits(max_batch_samples=1_400_000, max_batch_size=64, max_samples=250_000)  # fairseq's base
MASKS = MaskSettings(mask_prob=0.65, mask_length=10, num_negatives=100)
SEED = 0
STOCK_BATCH_SIZE = 8

Round = Callable[[int], float]
"""Delivers the batches of one epoch, given its number; returns the seconds of audio in them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--memory_batches", type=int, default=10_000)
    parser.add_argument("--memory_rows", type=int, default=1_000_000)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loader-benchmark-"))
    datasets.disable_progress_bars()
    try:
        indexes = make_corpus(folder, args.minutes)
        print(f"`python tests/benchmarks/loader.py --minutes {args.minutes:g} --num_rounds {args.num_rounds} ", end="")
        print(f"--memory_batches {args.memory_batches}`\n\n{environment()}\n")
        rates = measure(rounds(folder, indexes), args.num_rounds)
        print(rate_table(rates))
        print(worker_line(indexes["FLAC"]))
        print(memory_table(indexes["FLAC"], args.memory_rows, args.memory_batches))
    finally:
        shutil.rmtree(folder)


def make_corpus(folder: Path, minutes: float) -> dict[str, AudioIndex]:
    """Write the same utterances in every format; the index of each."""
    rng = np.random.default_rng(SEED)
    paths = sorted(str(path) for path in CORPUS.glob("train/*/*.opus"))
    speech = np.concatenate([decode(path, 0, read_num_samples(path)) for path in paths])
    utterances: list[npt.NDArray[np.float32]] = []
    while sum(len(utterance) for utterance in utterances) < minutes * 60 * SAMPLE_RATE:
        length = int(np.clip(rng.lognormal(np.log(12), 0.35), 2, 30) * SAMPLE_RATE)
        start = int(rng.integers(0, len(speech) - length))
        utterances.append(speech[start : start + length])
    for name, subtype, container in (("wav", "PCM_16", "WAV"), ("flac", "PCM_16", "FLAC"), ("opus", "OPUS", "OGG")):
        (folder / name).mkdir()
        for number, utterance in enumerate(utterances):
            soundfile.write(folder / name / f"{number:06d}.{name}", utterance, SAMPLE_RATE, subtype, format=container)
    write_containers(folder)
    sources = {
        "WAV": "wav", "FLAC": "flac", "Opus": "opus", "FLAC in tar": "speech.tar", "FLAC in Parquet": "speech.parquet",
    }  # fmt: skip
    return {
        name: build_index(str(folder / source), str(folder / "cache"), progress=False)[0]
        for name, source in sources.items()
    }


def write_containers(folder: Path) -> None:
    """The FLAC files in a tar shard and in a Parquet file; and the floats that the stock recipe's `map` leaves."""
    files = sorted((folder / "flac").iterdir())
    with tarfile.open(folder / "speech.tar", "w") as shard:
        for file in files:
            shard.add(file, file.name)
    rows = [{"audio": {"bytes": file.read_bytes(), "path": file.name}} for file in files]
    undecoded = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(SAMPLE_RATE, decode=False))
    undecoded.to_parquet(str(folder / "speech.parquet"))
    undecoded.save_to_disk(str(folder / "undecoded"))
    extractor = feature_extractor()

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        waveform, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        inputs = extractor(
            waveform, sampling_rate=SAMPLE_RATE, max_length=LIMITS.max_samples, truncation=True, return_tensors="np"
        )
        return {"input_values": inputs.input_values[0], "input_length": len(inputs.input_values[0])}

    undecoded.map(prepare, remove_columns=["audio"], cache_file_name=str(folder / "floats.arrow"))


def feature_extractor() -> Wav2Vec2FeatureExtractor:
    return Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE, do_normalize=True, return_attention_mask=False)


def rounds(folder: Path, indexes: dict[str, AudioIndex]) -> dict[str, Round]:
    """What is compared, by name."""
    undecoded = datasets.load_from_disk(str(folder / "undecoded"))
    floats = datasets.Dataset.from_file(str(folder / "floats.arrow"))
    return {
        **{f"ours, {name}": our_round(index) for name, index in indexes.items()},
        "`datasets`, FLAC bytes by `Audio(decode=False)`, soundfile, feature extractor": decoded_round(undecoded),
        "stock recipe's cached floats, read and padded as it does": float_round(floats),
        "the same floats, `with_format('numpy')`": float_round(floats.with_format("numpy")),
    }


def our_round(index: AudioIndex) -> Round:
    """As a loader process does it."""
    dataset = UtteranceDataset(index, WAV2VEC2_GEOMETRY, MASKS, SEED, random_crop=True)

    def run(epoch: int) -> float:
        batches = epoch_batches(Batching(index.num_samples, LIMITS, SEED), epoch)
        return sum(dataset[spec].input_values.numel() for spec in batches) / SAMPLE_RATE

    return run


def stock_batches(num_rows: int, epoch: int) -> Iterator[list[int]]:
    """Rows in random order, as `DataLoader(shuffle=True)` deals them out."""
    order = np.random.default_rng(epoch).permutation(num_rows).tolist()
    for first in range(0, num_rows, STOCK_BATCH_SIZE):
        yield order[first : first + STOCK_BATCH_SIZE]


def decoded_round(dataset: datasets.Dataset) -> Round:
    extractor = feature_extractor()

    def load(row: int) -> npt.NDArray[np.float32]:
        waveform: npt.NDArray[np.float32] = soundfile.read(io.BytesIO(dataset[row]["audio"]["bytes"]), dtype="float32")[
            0
        ]
        return waveform[: LIMITS.max_samples]

    def run(epoch: int) -> float:
        num_samples = 0
        for rows in stock_batches(len(dataset), epoch):
            waveforms = [load(row) for row in rows]
            extractor(waveforms, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
            num_samples += sum(map(len, waveforms))
        return num_samples / SAMPLE_RATE

    return run


def float_round(dataset: datasets.Dataset) -> Round:
    extractor = feature_extractor()

    def run(epoch: int) -> float:
        num_samples = 0
        for rows in stock_batches(len(dataset), epoch):
            features = [{"input_values": dataset[row]["input_values"]} for row in rows]
            extractor.pad(features, padding=True, return_tensors="pt")
            num_samples += sum(len(each["input_values"]) for each in features)
        return num_samples / SAMPLE_RATE

    return run


def measure(compared: dict[str, Round], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of audio per second of the processor, in every round; a first one warms the page cache."""
    rates: dict[str, list[float]] = {name: [] for name in compared}
    for epoch in range(num_rounds + 1):
        for name, run in compared.items():
            start = time.process_time()
            seconds = run(epoch)
            rates[name].append(seconds / (time.process_time() - start))
    return {name: values[1:] for name, values in rates.items()}


def rate_table(rates: dict[str, list[float]]) -> str:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    *_, recipe, _ = medians.values()
    lines = ["| One core | x real time, median | lowest to highest | x the recipe's floats |", "|---|--:|--:|--:|"]
    for name, values in rates.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        lines.append(f"| {name} | {medians[name]:,.0f} | {spread} | {medians[name] / recipe:.2f} |")
    return "\n".join([*lines, ""])


def worker_line(index: AudioIndex, num_batches: int = 200) -> str:
    """What arrives from one loader process, by the clock, and what that costs the training process."""
    batching = Batching(index.num_samples, LIMITS, SEED)
    stream = training_windows(dataset_of(index), batching, Cursor(0, 0), 0, 1, 1, num_workers=1, pin_memory=False)
    for _ in range(10):
        next(stream)
    start, start_cpu = time.perf_counter(), time.process_time()
    windows = itertools.islice(stream, num_batches)
    seconds = sum(batch.input_values.numel() for window in windows for batch in window.batches) / SAMPLE_RATE
    rate = seconds / (time.perf_counter() - start)
    cost = (time.process_time() - start_cpu) / num_batches
    stream.close()
    return (
        f"From one worker through `training_windows`, FLAC, by the clock: {rate:,.0f} x real time; receiving takes the "
        f"training process {1000 * cost:.1f} ms per batch of {seconds / num_batches:.1f} s.\n"
    )


def dataset_of(index: AudioIndex) -> UtteranceDataset:
    return UtteranceDataset(index, WAV2VEC2_GEOMETRY, MASKS, SEED, random_crop=True)


def memory_table(index: AudioIndex, num_rows: int, num_batches: int) -> str:
    """Resident memory of the training process and of two workers after a tenth of the batches and after all."""
    many = index.take(np.arange(num_rows) % len(index))
    limits = Limits(max_batch_samples=16 * SAMPLE_RATE, max_batch_size=8, max_samples=2 * SAMPLE_RATE)
    batching = Batching(many.num_samples, limits, SEED)
    # close to the end of an epoch: the order of the next one is computed on the way
    cursor = Cursor(0, len(epoch_batches(batching, 0)) - num_batches // 2)
    stream = training_windows(dataset_of(many), batching, cursor, 0, 1, 1, num_workers=2, pin_memory=False)
    lines = ["| Resident memory after | training process | workers |", "|---|--:|--:|"]
    for number in range(1, num_batches + 1):
        next(stream)
        if number * 10 in (num_batches, 5 * num_batches, 10 * num_batches):
            workers = ", ".join(f"{resident_mb(process.pid or 0):.0f} MB" for process in active_children())
            lines.append(f"| {number:,} batches | {resident_mb(os.getpid()):.0f} MB | {workers} |")
    stream.close()
    lines.append(f"\nBatches of 8 x 2 s of {num_rows:,} rows, across the end of an epoch.")
    return "\n".join(lines)


def resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def environment() -> str:
    model = next(
        (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "CPU"
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "soundfile", "datasets", "transformers"))
    return (
        f"{model}, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"{packages}, libsndfile {soundfile.__libsndfile_version__}; torchcodec not installed, so `datasets` cannot "
        "decode by itself: soundfile does."
    )


if __name__ == "__main__":
    main()
