"""From data flags to batches: what an epoch takes of each source."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from trainer.arguments import PretrainArguments
from trainer.data.batching import Batching, epoch_batches
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.errors import UserError
from trainer.run.corpus import Corpus, batching_of, open_corpus

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two folders: 40 files of 3 s, and 4 files of 6 s."""
    for name, count, seconds in (("many", 40, 3), ("few", 4, 6)):
        (tmp_path / name).mkdir()
        for number in range(count):
            noise = np.random.default_rng(number).standard_normal(seconds * 16_000) / 10
            soundfile.write(tmp_path / name / f"{number}.wav", noise, 16_000)
    return [str(tmp_path / "many"), str(tmp_path / "few")]


def open_(sources: list[str], tmp_path: Path, **values: Any) -> tuple[Corpus, Batching]:
    arguments = PretrainArguments(
        dataset_name=sources, cache_dir=str(tmp_path / "cache"), validation_split_percentage=0,
        max_duration_in_seconds=3.0, **values,
    )  # fmt: skip
    corpus = open_corpus(arguments, WAV2VEC2_GEOMETRY, progress=False)
    return corpus, batching_of(arguments, corpus.train)


def seconds_taken(corpus: Corpus, batching: Batching, num_epochs: int) -> list[float]:
    """Of each source, per epoch."""
    seconds = np.zeros(2)
    for epoch in range(num_epochs):
        for spec in epoch_batches(batching, epoch):
            for row in spec.rows:
                seconds[corpus.train.tags[row]] += spec.num_samples / 16_000
    return [float(each) for each in seconds / num_epochs]


def test_an_epoch_is_the_audio_there_is(sources: list[str], tmp_path: Path) -> None:
    assert seconds_taken(*open_(sources, tmp_path), num_epochs=1) == [120, 24]


def test_an_epoch_of_one_crop_each(sources: list[str], tmp_path: Path) -> None:
    assert seconds_taken(*open_(sources, tmp_path, one_crop_per_utterance=True), num_epochs=1) == [120, 12]


@pytest.mark.parametrize("one_crop_per_utterance", [False, True])
def test_sources_are_balanced(sources: list[str], tmp_path: Path, one_crop_per_utterance: bool) -> None:
    opened = open_(sources, tmp_path, sampling_alpha=0.0, one_crop_per_utterance=one_crop_per_utterance)
    total = 132 if one_crop_per_utterance else 144
    assert seconds_taken(*opened, num_epochs=20) == pytest.approx([total / 2, total / 2], rel=0.03)


def test_nothing_to_balance(sources: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^sampling_alpha \(0.5\) must be 1 for audio of one language from one source"):
        open_(sources[:1], tmp_path, sampling_alpha=0.5)


def test_no_room_for_an_index(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    soundfile.write(tmp_path / "corpus/a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 80_000), 16_000)
    # -B: byte code would be cut off too
    words = [sys.executable, "-B", "-m", "trainer", "prepare", f"--dataset_name={tmp_path / 'corpus'}"]
    words.append(f"--cache_dir={tmp_path / 'cache'}")
    small = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh"]
    limited = subprocess.run([*small, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert limited.returncode == 1
    assert (
        f"trainer: error: the index in {tmp_path}/cache/audio-index cannot be written: File too large."
        in limited.stderr
    )
    assert "Traceback" not in limited.stderr
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert subprocess.run(words, cwd=REPOSITORY, check=False).returncode == 0
