"""Live tensors of real training on the CPU, under plain PyTorch and DeepSpeed, against what `trainer plan` predicts."""

import pytest

from tests.benchmarks.training_memory import run
from trainer.run.ds_config import shipped_configs

pytestmark = pytest.mark.slow

LIMIT = 0.1


@pytest.mark.parametrize(
    "configuration", ["plain", *(name for name in ("zero2_offload", "zero3_offload") if name in shipped_configs())]
)
def test_peak_as_predicted(configuration: str) -> None:
    found = run(f"cpu:{configuration}")
    print(f"{configuration}: predicted {found['predicted']:,} bytes, measured {found['measured']:,}")
    assert found["predicted"] == pytest.approx(found["measured"], rel=LIMIT)
