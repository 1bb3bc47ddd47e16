"""Make the small synthetic speech corpus of the tests from texts/<split>/<language>.txt.

Usage: python tests/corpus/make_corpus.py [--output FOLDER]

Needs espeak-ng and sox (programs) and soundfile (Python package). The same versions of these give the same files.
"""

from __future__ import annotations

import argparse
import importlib
import io
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import numpy as np
except ModuleNotFoundError:
    print("make_corpus.py: numpy is missing (PyPI package numpy)", file=sys.stderr)
    raise SystemExit(2) from None

HERE = Path(__file__).resolve().parent
SAMPLE_RATE = 16_000
MIN_SECONDS = 2.0
MAX_SECONDS = 12.0
SPLITS = ("train", "validation")
# libsndfile maps 0..1 to 256..6 kbit/s per channel; this asks for about 26 kbit/s.
COMPRESSION_LEVEL = 0.92


@dataclass(frozen=True)
class Speaker:
    """A voice and the room and microphone it is heard through.

    pitch is 0..99, speed in words per minute, bass and treble in dB, room is sox's reverberance in percent,
    level is the peak amplitude (full scale is 1), noise is the background's RMS in dB below the speech's RMS,
    and colour is the exponent of the noise spectrum's fall (0 white, 1 pink, 2 brown).
    """

    split: str
    voice: str
    pitch: int
    speed: int
    bass: float = 0.0
    treble: float = 0.0
    room: int = 0
    level: float = 0.5
    noise: float = 40.0
    colour: float = 1.0

    @property
    def name(self) -> str:
        """Folder name: the voice in lower case with a hyphen for the plus sign."""
        return self.voice.replace("+", "-").lower()

    @property
    def language(self) -> str:
        """Two-letter code of the language."""
        return self.voice[:2]


SPEAKERS = (
    Speaker("train", "en-us+m3", 38, 165, bass=2, room=8, noise=38, colour=1.0),
    Speaker("train", "en-us+f2", 62, 178, treble=2, level=0.4, noise=44, colour=0.5),
    Speaker("train", "en-gb-scotland+m7", 50, 156, bass=-3, room=20, level=0.6, noise=34, colour=1.5),
    Speaker("train", "de+f3", 55, 160, treble=-3, room=12, noise=40, colour=1.0),
    Speaker("train", "de+m1", 30, 172, bass=3, level=0.35, noise=36, colour=2.0),
    Speaker("train", "de+linda", 70, 150, bass=-4, treble=3, level=0.55, noise=46, colour=0.0),
    Speaker("train", "fr-fr+m2", 44, 158, room=25, noise=38, colour=1.5),
    Speaker("train", "fr-be+f1", 66, 150, treble=-4, level=0.6, noise=32, colour=1.0),
    Speaker("train", "fr-ch+m4", 26, 170, bass=4, treble=2, level=0.45, noise=42, colour=0.5),
    Speaker("train", "es+f4", 58, 166, bass=-2, room=10, level=0.4, noise=36, colour=1.0),
    Speaker("train", "es-419+max", 40, 150, treble=4, noise=45, colour=1.0),
    Speaker("train", "it+m5", 35, 160, bass=-5, treble=-2, room=15, level=0.6, noise=35, colour=2.0),
    Speaker("train", "it+Alicia", 60, 152, bass=1, treble=1, level=0.5, noise=43, colour=0.5),
    Speaker("validation", "en-gb+f5", 54, 168, treble=2, room=10, level=0.45, noise=40, colour=1.0),
    Speaker("validation", "de+m8", 42, 160, bass=-2, level=0.55, noise=36, colour=1.5),
    Speaker("validation", "fr-fr+steph", 64, 156, bass=2, room=18, level=0.4, noise=42, colour=0.5),
    Speaker("validation", "es+m6", 33, 158, treble=-3, noise=38, colour=1.0),
)


@dataclass(frozen=True)
class Utterance:
    """One sentence of one speaker; number counts from 1 within the speaker."""

    speaker: Speaker
    number: int
    text: str

    @property
    def path(self) -> str:
        """Path of the audio file relative to the corpus, with forward slashes."""
        name = self.speaker.name
        return f"{self.speaker.split}/{name}/{name}-{self.number:03d}.opus"


def read_texts(split: str, language: str) -> list[str]:
    """The sentences of one split and language, one per line of the file."""
    lines = (HERE / "texts" / split / f"{language}.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def plan() -> list[Utterance]:
    """Deal the sentences of each split and language in turn to its speakers."""
    utterances = []
    for speaker in SPEAKERS:
        peers = [s for s in SPEAKERS if (s.split, s.language) == (speaker.split, speaker.language)]
        texts = read_texts(speaker.split, speaker.language)[peers.index(speaker) :: len(peers)]
        utterances += [Utterance(speaker, number, text) for number, text in enumerate(texts, start=1)]
    check_plan(utterances)
    return utterances


def check_plan(utterances: list[Utterance]) -> None:
    """Assert that paths and texts are unique and that the splits share no speaker and no voice variant."""
    assert len({u.path for u in utterances}) == len(utterances), "a path occurs twice"
    assert len({u.text.casefold() for u in utterances}) == len(utterances), "a text occurs twice"
    train, validation = ([s for s in SPEAKERS if s.split == split] for split in SPLITS)
    assert not {s.name for s in train} & {s.name for s in validation}, "a speaker is in both splits"
    variants = [{s.voice.partition("+")[2] for s in speakers} for speakers in (train, validation)]
    assert not variants[0] & variants[1], "a voice variant is in both splits"


def synthesize(utterance: Utterance, rng: np.random.Generator, folder: Path) -> Path:
    """Speak the text with espeak-ng and shape it with sox; return a 16 kHz mono 16-bit WAV file."""
    speaker = utterance.speaker
    raw, shaped = folder / "raw.wav", folder / "shaped.wav"
    pitch = int(np.clip(speaker.pitch + rng.integers(-4, 5), 0, 99))
    speed = round(speaker.speed * rng.uniform(0.94, 1.06))
    espeak = ["espeak-ng", "-v", speaker.voice, "-p", str(pitch), "-s", str(speed), "-w", str(raw), utterance.text]
    subprocess.run(espeak, check=True)
    trim = ["silence", "1", "0.01", "0.3%", "reverse"] * 2
    # The gain leaves headroom for the filters, which would clip at 16 bits; the level is set afterwards.
    effects = ["gain", "-n", "-12", "bass", f"{speaker.bass:g}", "treble", f"{speaker.treble:g}"]
    if speaker.room:
        effects += ["pad", "0", "0.15", "reverb", str(speaker.room), "50", str(2 * speaker.room)]
    form = ["-r", str(SAMPLE_RATE), "-c", "1", "-b", "16"]
    subprocess.run(["sox", "-R", "-D", str(raw), *form, str(shaped), *trim, *effects], check=True)
    return shaped


def coloured_noise(length: int, colour: float, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Noise of RMS 1 whose power falls with frequency to the given exponent, flat below 50 Hz."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 50.0)
    noise = np.fft.irfft(spectrum * frequency ** (-colour / 2), length)
    return np.asarray(noise / np.sqrt(np.mean(noise**2)), dtype=np.float64)


def finish(
    speech: np.ndarray[Any, np.dtype[np.float64]], speaker: Speaker, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Add short pauses at both ends and background noise, and set the level."""
    before, after = (int(seconds * SAMPLE_RATE) for seconds in rng.uniform(0.08, 0.3, size=2))
    padded = np.pad(speech, (before, after))
    rms = np.sqrt(np.mean(speech**2))
    mixed = padded + coloured_noise(len(padded), speaker.colour, rng) * rms * 10 ** (-speaker.noise / 20)
    level = speaker.level * rng.uniform(0.85, 1.15)
    return np.asarray(mixed * (level / np.max(np.abs(mixed))), dtype=np.float64)


def crc_table() -> tuple[int, ...]:
    """Table of the Ogg page checksum: polynomial 0x04c11db7, most significant bit first."""
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return tuple(table)


CRC_TABLE = crc_table()


def ogg_crc(page: bytes) -> int:
    """Checksum of an Ogg page whose own checksum field is zero."""
    value = 0
    for byte in page:
        value = ((value << 8) & 0xFFFFFFFF) ^ CRC_TABLE[(value >> 24) ^ byte]
    return value


def pages(data: bytes) -> Iterator[bytes]:
    """The pages of an Ogg file."""
    start = 0
    while start < len(data):
        assert data[start : start + 4] == b"OggS", "not an Ogg page"
        segments = data[start + 26]
        end = start + 27 + segments + sum(data[start + 27 : start + 27 + segments])
        yield data[start:end]
        start = end


def with_serial(data: bytes, serial: int) -> bytes:
    """The Ogg file with another stream serial number; libsndfile draws one from the clock."""
    result = []
    for page in pages(data):
        blank = page[:14] + struct.pack("<I", serial) + page[18:22] + bytes(4) + page[26:]
        result.append(blank[:22] + struct.pack("<I", ogg_crc(blank)) + blank[26:])
    return b"".join(result)


def make_utterance(utterance: Utterance, output: Path, folder: Path, soundfile: Any) -> float:
    """Write the audio file of an utterance and return its length in seconds."""
    seed = zlib.crc32(utterance.path.encode())
    rng = np.random.default_rng(seed)
    speech, rate = soundfile.read(synthesize(utterance, rng, folder), dtype="float64")
    assert rate == SAMPLE_RATE, rate
    audio = finish(speech, utterance.speaker, rng)
    seconds = len(audio) / SAMPLE_RATE
    assert MIN_SECONDS <= seconds <= MAX_SECONDS, f"{utterance.path}: {seconds:.2f} s"
    buffer = io.BytesIO()
    options = {"format": "OGG", "subtype": "OPUS", "compression_level": COMPRESSION_LEVEL}
    soundfile.write(buffer, audio, SAMPLE_RATE, **options)
    path = output / utterance.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(with_serial(buffer.getvalue(), seed))
    return seconds


def remove_stale(utterances: list[Utterance], output: Path) -> None:
    """Delete audio files of an earlier run that are no longer part of the corpus."""
    wanted = {output / u.path for u in utterances}
    for split in SPLITS:
        for path in (output / split).glob("*/*.opus"):
            if path not in wanted:
                path.unlink()


def write_transcripts(utterances: list[Utterance], seconds: list[float], output: Path) -> None:
    """Write transcripts.tsv, sorted by path."""
    rows = ["path\tspeaker\tlanguage\tseconds\ttext"]
    for u, length in sorted(zip(utterances, seconds, strict=True), key=lambda pair: pair[0].path):
        rows.append(f"{u.path}\t{u.speaker.name}\t{u.speaker.language}\t{length:.3f}\t{u.text}")
    (output / "transcripts.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def print_table(utterances: list[Utterance], seconds: list[float]) -> None:
    """Print the README's table of speakers."""
    print("| split | speaker | language | utterances | minutes |\n|---|---|---|---:|---:|")
    for speaker in SPEAKERS:
        lengths = [s for u, s in zip(utterances, seconds, strict=True) if u.speaker == speaker]
        row = (speaker.split, f"`{speaker.name}`", speaker.language, str(len(lengths)), f"{sum(lengths) / 60:.2f}")
        print("| " + " | ".join(row) + " |")
    print(f"| | | | {len(seconds)} | {sum(seconds) / 60:.2f} |")


def load_soundfile() -> Any:
    """The soundfile module, once it and both programs are known to be there; else exit with code 2."""
    for program in ("espeak-ng", "sox"):
        if shutil.which(program) is None:
            print(f"make_corpus.py: {program} is missing (Debian package {program})", file=sys.stderr)
            raise SystemExit(2)
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError):
        print("make_corpus.py: soundfile is missing (PyPI package soundfile)", file=sys.stderr)
        raise SystemExit(2) from None


def main() -> None:
    """Make the corpus."""
    parser = argparse.ArgumentParser(description="Make the synthetic speech corpus of the tests.")
    parser.add_argument("--output", type=Path, default=HERE, metavar="FOLDER", help="default: this script's folder")
    output: Path = parser.parse_args().output
    soundfile = load_soundfile()
    utterances = plan()
    remove_stale(utterances, output)
    with tempfile.TemporaryDirectory() as folder:
        seconds = [make_utterance(u, output, Path(folder), soundfile) for u in utterances]
    write_transcripts(utterances, seconds, output)
    print_table(utterances, seconds)


if __name__ == "__main__":
    main()
