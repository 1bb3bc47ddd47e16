"""Sums and counts of an interval, read out as the means that go into `metrics.jsonl`."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.model.pretraining import LossTerms

_SUMS = (*LossTerms._fields, "audio_seconds")


class Totals:
    """Sums of one interval on one rank, kept on the device; nothing waits for them until they are read."""

    def __init__(self, device: torch.device) -> None:
        # fp64, which CPU and CUDA have: thousands of micro-batches add up without loss
        self.values = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)

    def add(self, terms: LossTerms, audio_seconds: float) -> None:
        """Add one micro-batch."""
        self.values[: len(terms)] += torch.stack([term.detach() for term in terms]).to(self.values.dtype)
        self.values[_SUMS.index("audio_seconds")] += audio_seconds

    def reset(self) -> None:
        """Begin a new interval."""
        self.values.zero_()


def means(sums: Tensor) -> dict[str, float]:
    """Means per masked frame of sums over all ranks (`Totals.values` after a reduction)."""
    by_name = dict(zip(_SUMS, sums.tolist(), strict=True))
    count = max(by_name["num_targets"], 1.0)
    return {
        "loss": by_name["loss"] / count,
        "contrastive_loss": by_name["contrastive_loss"] / count,
        "diversity_loss": by_name["diversity_loss"] / count,
        "feature_penalty": by_name["feature_penalty"] / count,
        "accuracy": by_name["num_correct"] / count,
        "code_perplexity": by_name["code_perplexity"] / count,
        "prob_perplexity": by_name["prob_perplexity"] / count,
        "num_targets": by_name["num_targets"],
        "audio_seconds": by_name["audio_seconds"],
    }


def append_line(path: Path, line: Mapping[str, float | int | str | None]) -> None:
    """Append one JSON line; a value that is not finite becomes null, for JSON has no NaN."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of updates after `step`, which a resumed run makes again, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    replacement = path.with_name(path.name + ".new")
    replacement.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(replacement, path)
