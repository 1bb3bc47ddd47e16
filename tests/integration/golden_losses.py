"""Losses of the first 50 updates of the demo recipe (fp32, one rank), step by step, against stored ones.

    python tests/integration/golden_losses.py            # run, compare, print the table
    python tests/integration/golden_losses.py --write    # store what this machine gets

Stored with the losses is the platform they come from. There they must be met exactly; elsewhere other kernels round
otherwise, and the limit is a relative difference. Other versions of transformers draw other initial weights. Whoever
changes the numerics on purpose runs it with --write and shows both tables in the commit message.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
STORED = Path(__file__).with_name("golden_losses.json")
NUM_UPDATES = 50
KEYS = ("loss", "contrastive_loss", "diversity_loss", "grad_norm", "code_perplexity", "num_targets", "learning_rate")
TOLERANCE_ELSEWHERE = 1e-4


def this_platform() -> dict[str, str]:
    """What the last bit of a loss depends on."""
    import soundfile
    import torch

    lines = re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    flags = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "instructions": hashlib.sha256((flags[1] if flags else "").encode()).hexdigest()[:16],
        "processor": ", ".join(f"{name} {value}" for name, value in dict(reversed(lines)).items()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "libsndfile": soundfile.__libsndfile_version__,
        **{name: version(name) for name in ("torch", "transformers", "numpy", "soxr")},
    }


def run_demo(folder: Path) -> list[dict[str, float]]:
    """Train in a process of its own; the metrics of each update."""
    command = [
        sys.executable, "-m", "trainer", "pretrain", "--config=demo", "--dataset_name=tests/corpus/train",
        "--validation_dataset_name=tests/corpus/validation", f"--output_dir={folder / 'run'}",
        f"--cache_dir={folder / 'cache'}", f"--max_train_steps={NUM_UPDATES}", "--num_warmup_steps=10",
        "--logging_steps=1", "--saving_steps=1000", "--eval_steps=1000",
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_", "LOCAL_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, check=True)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    train = [line for line in map(json.loads, lines) if line["split"] == "train"]
    return [{"step": line["step"], **{key: line[key] for key in KEYS}} for line in train]


def difference(found: float, stored: float) -> float:
    """Relative difference; 0 only for equal values."""
    return abs(found - stored) / max(abs(stored), 1e-12)


def table(found: list[dict[str, float]], stored: list[dict[str, float]]) -> str:
    """Both losses and norms of every update with their relative differences."""
    lines = ["step  loss found  stored      differs   grad norm found  stored      differs"]
    for ours, theirs in zip(found, stored, strict=True):
        columns = [
            f"{ours[key]:<11.7f} {theirs[key]:<11.7f} {difference(ours[key], theirs[key]):.1e}"
            for key in ("loss", "grad_norm")
        ]
        lines.append(f"{ours['step']:>4}  {'   '.join(columns)}")
    return "\n".join(lines)


def read_stored() -> dict[str, Any]:
    """`platform` and `updates`."""
    return json.loads(STORED.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def main() -> None:
    """Run the demo's first updates and compare or store them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="Store the losses of this machine.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_demo(Path(folder))
    if STORED.exists() and len(stored := read_stored()["updates"]) == len(found):
        print(table(found, stored))
    if options.write:
        rows = ",\n    ".join(json.dumps(line) for line in found)
        where = json.dumps(this_platform(), indent=4).replace("\n}", "\n  }")
        STORED.write_text(f'{{\n  "platform": {where},\n  "updates": [\n    {rows}\n  ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
