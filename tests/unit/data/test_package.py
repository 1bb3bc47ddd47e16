import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["frames", "audio", "sources", "index", "masking", "batching"])
def test_torch_is_imported_by_collate_and_loader_only(module: str) -> None:
    program = f"import sys, trainer.data.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
