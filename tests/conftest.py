"""Settings that libraries read when they are imported: no test reaches for a network or, unless asked to, for a GPU."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"


def pytest_configure(config: pytest.Config) -> None:
    """Stored values and references are those of a CPU; `-m gpu` runs the tests that are for a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
