"""Training within 24 GiB of a card, and its peak against what `trainer plan` predicts: `pytest -m gpu`."""

import pytest
import torch

from tests.benchmarks.training_memory import CAP_BYTES, CASES, run
from trainer.model.sizes import SIZES

LIMIT = 0.1


def _why_not(name: str) -> str | None:
    if CASES[name].size not in SIZES:
        return f"{CASES[name].size} is not a shipped size"
    if not torch.cuda.is_available():
        return "needs a GPU that torch can use"
    if torch.cuda.get_device_properties(0).total_memory < CAP_BYTES:
        return "needs a GPU of 24 GiB or more"
    return None


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_peak_as_predicted(name: str) -> None:
    if reason := _why_not(name):
        pytest.skip(reason)
    found = run(name)
    print(
        f"\n{name} on {torch.cuda.get_device_name()}: predicted {found['predicted'] / 2**30:.2f} GiB, measured "
        f"{found['measured'] / 2**30:.2f} GiB ({found['reserved'] / 2**30:.2f} reserved, "
        f"{found['outside_the_allocator'] / 2**30:.2f} outside the allocator)"
    )
    assert found["predicted"] == pytest.approx(found["measured"], rel=LIMIT)
