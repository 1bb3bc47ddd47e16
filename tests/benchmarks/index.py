"""What preparation and the index cost: headers per second on one core, and opening a million utterances.

    python tests/benchmarks/index.py [--num_files 60000] [--num_rows 1000000]

Files are hard links to FLAC files of noise, their headers in the page cache. A million files do not fit everywhere, so
the large index is that of a manifest whose files are not there, with lengths made up. Rates are per second of the
processor, so that other programs change little; memory is what the process holds beyond the imports.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile

import trainer.data.index_build as index_build
from trainer.data.index import build_index, filter_by_duration, find_index, split_validation
from trainer.data.rows import Request
from trainer.data.sources import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_files", type=int, default=60_000)
    parser.add_argument("--num_rows", type=int, default=1_000_000)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="index-benchmark-"))
    try:
        headers(folder, args.num_files)
        if os.fork() == 0:  # the index is opened in another process than the one that wrote it
            build_large(folder, args.num_rows)
            os._exit(0)
        os.wait()
        open_large(folder, args.num_rows)
    finally:
        shutil.rmtree(folder)


def headers(folder: Path, num_files: int) -> None:
    """Seconds of the processor for listing a folder and reading all headers, in one process."""
    rng = np.random.default_rng(0)
    for number in range(num_files):
        path = folder / "corpus" / f"{number // 1000:04d}" / f"{number:08d}.flac"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
            soundfile.write(path, 0.1 * rng.standard_normal(160_000), 16_000)
            first = path
        else:
            os.link(first, path)
    corpus, cache = str(folder / "corpus"), str(folder / "cache")
    start = time.process_time()
    source = open_source(Request(corpus))
    listed = time.process_time() - start
    start = time.process_time()
    index, _ = build_index(corpus, cache, progress=False, num_processes=1)
    built = time.process_time() - start
    (file,) = (folder / "cache").iterdir()
    names = sum(len(stamp.path) for stamp in source.stamps)
    names_to_open = [index.path(row) for row in range(min(3_000, num_files))]
    start = time.process_time()
    for name in names_to_open:
        soundfile.info(name)
    alone = time.process_time() - start
    print(f"listing a folder of {num_files:,} files:   {num_files / listed:10,.0f} files/s of one core")
    print(f"preparing it (listing included):  {num_files / built:10,.0f} files/s of one core")
    print(f"soundfile.info for comparison:    {len(names_to_open) / alone:10,.0f} files/s of one core")
    print(f"index beside the paths:           {(file.stat().st_size - names) / num_files:10.1f} bytes a row")


def build_large(folder: Path, num_rows: int) -> None:
    """Index of a manifest, its lengths drawn at random instead of read."""
    lines = (
        f"speakers/{number // 100:06d}/{number:09d}.flac\t1\tlanguage-{number % 50}\n" for number in range(num_rows)
    )
    with (folder / "large.tsv").open("w") as file:
        file.write(f"{folder}\n")
        file.writelines(lines)
    rng = np.random.default_rng(0)
    with mock.patch.object(index_build, "read_num_samples", lambda _: int(rng.integers(16_000, 480_000))):
        build_index(str(folder / "large.tsv"), str(folder / "cache"), progress=True, num_processes=1)


def open_large(folder: Path, num_rows: int) -> None:
    """Seconds and resident memory for opening, filtering and splitting it, and for reading places at random."""
    before = resident_bytes()
    start = time.perf_counter()
    found = find_index(Request(str(folder / "large.tsv")), str(folder / "cache"))
    assert found is not None and len(found[0]) == num_rows
    opened = time.perf_counter() - start
    kept, _ = filter_by_duration(found[0], min_seconds=2.0)
    train, _ = split_validation(kept, percentage=1, seed=0)
    split = time.perf_counter() - start
    rows = np.random.default_rng(0).integers(0, len(train), 10_000).tolist()
    start = time.perf_counter()
    for row in rows:
        train.place(row)
    place = (time.perf_counter() - start) / len(rows)
    del found, kept
    print(f"opening {num_rows:,} rows: {opened:.2f} s; filtered and split: {split:.2f} s")
    print(f"resident memory for it: {(resident_bytes() - before) / 1e6:.0f} MB, mapped pages included")
    print(f"the place of a row: {1e6 * place:.1f} us")


def resident_bytes() -> int:
    """Memory of this process, shared pages included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
