"""What is in an index, for a person: hours, lengths, languages."""

import numpy as np

from trainer.data.audio import SAMPLE_RATE
from trainer.data.index import AudioIndex

_EDGES_SECONDS = (0, 1, 2, 3, 5, 8, 10, 15, 20, 30, 60, 300)
_BAR_WIDTH = 40


def describe_index(index: AudioIndex) -> str:
    """Totals, a histogram of lengths, and a table of languages and sources if there are several."""
    seconds = index.num_samples / SAMPLE_RATE
    middle = np.median(seconds)
    totals = (
        f"{len(index):,} utterances, {index.hours:,.2f} h; shortest {seconds.min():.2f} s, median {middle:.2f} s, "
        f"longest {seconds.max():.2f} s"
    )
    parts = [totals, _histogram(seconds)]
    if len(index.tag_names) > 1:
        parts.append(_table(index))
    return "\n\n".join(parts)


def _histogram(seconds: np.ndarray) -> str:
    """A line per range of lengths; the bars are hours, which is what training sees."""
    ranges = np.digitize(seconds, _EDGES_SECONDS) - 1
    counts = np.bincount(ranges, minlength=len(_EDGES_SECONDS))
    hours = np.bincount(ranges, weights=seconds, minlength=len(_EDGES_SECONDS)) / 3600
    lines = ["     length  utterances       hours"]
    for number in range(np.flatnonzero(counts)[0], np.flatnonzero(counts)[-1] + 1):
        low = _EDGES_SECONDS[number]
        last = number + 1 == len(_EDGES_SECONDS)
        name = f"over {low} s" if last else f"{low} - {_EDGES_SECONDS[number + 1]} s"
        bar = "#" * round(_BAR_WIDTH * hours[number] / hours.max())
        lines.append(f"{name:>11} {counts[number]:>11,} {hours[number]:>11,.2f}  {bar}".rstrip())
    return "\n".join(lines)


def _table(index: AudioIndex) -> str:
    """A line per tag, most hours first."""
    num_tags = len(index.tag_names)
    counts = np.bincount(index.tags, minlength=num_tags)
    hours = np.bincount(index.tags, weights=index.num_samples / SAMPLE_RATE, minlength=num_tags) / 3600
    width = max(20, *(len(name) for name in index.tag_names))
    lines = [f"{'language or source':<{width}} {'utterances':>11} {'hours':>11} {'share':>7}"]
    for tag in np.argsort(-hours, kind="stable").tolist():
        share = 100 * hours[tag] / hours.sum()
        lines.append(f"{index.tag_names[tag]:<{width}} {counts[tag]:>11,} {hours[tag]:>11,.2f} {share:>6.1f}%")
    return "\n".join(lines)
