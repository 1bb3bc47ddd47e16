"""What drawing masks and negatives costs: transformers' two helpers and ours, interleaved in one process.

    python tests/benchmarks/masking.py [--batch_size 8 --num_frames 750 --num_negatives 100] [--num_rounds 60]

Every round runs each ten times in a row, with new random numbers each time: medians are of warm caches on both sides.
Ours includes making the generators. Stock's negatives are for a mask drawn once.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

from trainer.data.masking import draw_masks, utterance_rng

MASK_PROB = 0.65
MASK_LENGTH = 10
REPEATS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_frames", type=int, default=750)
    parser.add_argument("--num_negatives", type=int, default=100)
    parser.add_argument("--num_rounds", type=int, default=60)
    args = parser.parse_args()
    np.random.seed(0)  # stock draws from the global generator
    shape = (args.batch_size, args.num_frames)
    mask = _compute_mask_indices(shape, MASK_PROB, MASK_LENGTH, min_masks=2)

    def ours(round_number: int) -> object:
        rngs = [utterance_rng(0, round_number, utterance, 0) for utterance in range(args.batch_size)]
        return draw_masks(rngs, args.num_frames, MASK_PROB, MASK_LENGTH, args.num_negatives)

    medians = time_interleaved(
        {
            "stock masks": lambda _: _compute_mask_indices(shape, MASK_PROB, MASK_LENGTH, min_masks=2),
            "stock negatives": lambda _: _sample_negative_indices(shape, args.num_negatives, mask),
            "ours, both": ours,
        },
        args.num_rounds,
    )
    stock = medians["stock masks"] + medians["stock negatives"]
    print(f"B={args.batch_size}, T={args.num_frames}, K={args.num_negatives}; medians of {args.num_rounds * REPEATS}")
    for name, milliseconds in medians.items():
        print(f"{name:16} {milliseconds:7.3f} ms")
    print(f"{'stock / ours':16} {stock / medians['ours, both']:7.1f}")


def time_interleaved(draws: dict[str, Callable[[int], object]], num_rounds: int) -> dict[str, float]:
    """Median milliseconds of each; in every round each is run `REPEATS` times in a row."""
    milliseconds: dict[str, list[float]] = {name: [] for name in draws}
    for round_number in range(num_rounds):
        for name, draw in draws.items():
            for repeat in range(REPEATS):
                start = time.perf_counter()
                draw(round_number * REPEATS + repeat)
                milliseconds[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in milliseconds.items()}


if __name__ == "__main__":
    main()
