"""Validation on all ranks: fixed crops, fixed masks, no dropout, the most likely codewords."""

from collections.abc import Iterable

import torch

from trainer.data.collate import Batch
from trainer.run.engine import Engine
from trainer.run.metrics import Totals, means
from trainer.run.skipped import SkippedLog
from trainer.run.steps import audio_seconds, forward


def evaluate(engine: Engine, batches: Iterable[tuple[Batch, bool]], skipped: SkippedLog) -> dict[str, float]:
    """Means over the whole validation data, the same on every rank.

    Each rank brings equally many batches, paired with whether they count: with ZeRO-3 a forward pass is collective.
    """
    totals = Totals(engine.device)
    engine.model.eval()
    with torch.no_grad():
        for batch, counts in batches:
            terms = forward(engine, batch)
            skipped.add(batch.skipped)
            if counts:
                totals.add(terms, audio_seconds(batch))
    engine.model.train()
    return means(engine.sum_over_ranks(totals.values))
