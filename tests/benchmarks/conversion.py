"""What a conversion costs in time and memory: DeepSpeed's zero_to_fp32.py, ours, and a plain copy of the result.

    python tests/benchmarks/conversion.py [--output FILE.md] [--stage 2|3] [--rounds 3] [--size large] [--folder FOLDER]

It writes the checkpoint that two ranks of the size's run in bf16 would save (random weights, no training; `large` needs
12 GB of disk below --folder), then starts every program in a process of its own, one after another, round by round,
and compares the results bit by bit. Memory is the most that was resident in the process, files that it had mapped
included. All files are in the page cache. Run it on an idle machine.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# Nothing heavy is imported here: Linux counts a process' memory before its start as that of the programs it starts.

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "deepspeed", "safetensors")
MIN_SPEEDUP = 4.0
MAX_MEMORY_SHARE = 1 / 3
MAX_MEMORY_BYTES = 10**9
THEIRS, OURS, UNCHECKED = "zero_to_fp32.py --safe_serialization", "trainer convert", "trainer convert --no_verify"
COPY, SAFE_COPY = "cp of the result", "cp of the result, then sync"


class Measurement(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measure(command: list[str]) -> Measurement:
    """Run a program to its end. Raises `SystemExit` with its output when it fails."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryFile("w+") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{output.read()[-3000:]}")
    return Measurement(seconds, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)


def commands(step_folder: Path, results: Path) -> dict[str, list[str]]:
    """What is measured, by name, in this order; each writes a folder of its own below `results`."""
    found = find_spec("deepspeed")  # only found, not imported
    assert found is not None and found.origin is not None
    # As DeepSpeed itself does when it saves; where it lies in the package, its neighbours hide standard modules.
    script = shutil.copy(Path(found.origin).with_name("utils") / "zero_to_fp32.py", results)
    theirs, ours, unchecked = (str(results / name) for name in ("theirs", "ours", "unchecked"))
    convert = [sys.executable, "-m", "trainer", "convert", str(step_folder)]
    copy = f"cp -r {ours} {results / 'copy'}"
    return {
        THEIRS: [sys.executable, str(script), str(step_folder), theirs, "--tag", "deepspeed", "--safe_serialization"],
        OURS: [*convert, ours],
        UNCHECKED: [*convert, unchecked, "--no_verify"],
        COPY: ["sh", "-c", copy],
        SAFE_COPY: ["sh", "-c", f"{copy} && sync {results / 'copy'}/*"],
    }


def run(step_folder: Path, results: Path, rounds: int) -> dict[str, list[Measurement]]:
    measured: dict[str, list[Measurement]] = {}
    for _ in range(rounds):
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
        for name, command in commands(step_folder, results).items():
            shutil.rmtree(results / "copy", ignore_errors=True)
            measured.setdefault(name, []).append(measure(command))
            print(f"{name}: {measured[name][-1].seconds:.1f} s", file=sys.stderr, flush=True)
    measure([sys.executable, __file__, "compare", str(results / "theirs"), str(results / "ours")])
    return measured


def table(measured: dict[str, list[Measurement]]) -> list[str]:
    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(measurement, field) for measurement in measured[name]))

    lines = [
        "| | seconds, median (all) | CPU seconds | peak resident memory | times faster | memory, of DeepSpeed's |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in measured.items():
        every = ", ".join(f"{measurement.seconds:.2f}" for measurement in found)
        lines.append(
            f"| {name} | {median(name, 'seconds'):.2f} ({every}) | {median(name, 'cpu_seconds'):.2f} "
            f"| {median(name, 'peak_bytes') / 1e6:.0f} MB "
            f"| {median(THEIRS, 'seconds') / median(name, 'seconds'):.1f} "
            f"| {median(name, 'peak_bytes') / median(THEIRS, 'peak_bytes'):.2f} |"
        )
    return lines


def failures(measured: dict[str, list[Measurement]]) -> list[str]:
    """The targets that were missed, in words."""
    theirs, ours = measured[THEIRS], measured[OURS]
    speedup = statistics.median(m.seconds for m in theirs) / statistics.median(m.seconds for m in ours)
    peak, their_peak = max(m.peak_bytes for m in ours), statistics.median(m.peak_bytes for m in theirs)
    found = []
    if speedup < MIN_SPEEDUP:
        found.append(f"{speedup:.1f} times as fast as zero_to_fp32.py, not {MIN_SPEEDUP:.0f}")
    if peak > MAX_MEMORY_SHARE * their_peak:
        found.append(f"{peak / their_peak:.2f} of zero_to_fp32.py's memory, more than a third")
    if peak > MAX_MEMORY_BYTES:
        found.append(f"{peak / 1e6:.0f} MB resident, more than 1 GB")
    return found


def write_checkpoint(step_folder: Path, size: str, stage: int) -> None:
    """In a process of its own: the step folder that two ranks would save. Weights are random, moments zero."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

    from trainer.convert.archive import plain_crc32
    from trainer.convert.partition import cut_group, share_numel
    from trainer.model.sizes import shipped_config

    torch.manual_seed(0)
    config = shipped_config(size)
    if not isinstance(config, Wav2Vec2Config):
        raise SystemExit(f"--size ({size}) must be a wav2vec2 model")
    model = Wav2Vec2ForPreTraining(config)
    config.architectures = ["Wav2Vec2ForPreTraining"]
    folder = step_folder / "deepspeed"
    folder.mkdir(parents=True)
    config.save_pretrained(step_folder)
    Wav2Vec2FeatureExtractor().save_pretrained(step_folder)
    named = dict(model.named_parameters())
    groups = [
        {name: value for name, value in named.items() if (value.ndim > 1) == matrices} for matrices in (True, False)
    ]
    model_states = {
        # Under ZeRO-3 DeepSpeed leaves an empty tensor where it has partitioned one.
        "module": {
            name: value.detach()[:0].bfloat16() if stage == 3 else value.detach().bfloat16()
            for name, value in model.state_dict().items()
        },
        "buffer_names": [name for name, _ in model.named_buffers()],
        "param_shapes": [{name: value.shape for name, value in group.items()} for group in groups],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "global_steps": 2,
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": version("deepspeed"),
    }
    for rank in range(2):
        partitions, mappings = [], []
        for group in groups:
            if stage == 3:
                shares = [torch.zeros(share_numel(value.numel(), 2)) for value in group.values()]
                for share, value in zip(shares, group.values(), strict=True):
                    own = value.detach().reshape(-1)[rank * len(share) : (rank + 1) * len(share)]
                    share[: len(own)] = own
                partitions.append(torch.cat(shares))
                continue
            vector = torch.cat([value.detach().reshape(-1) for value in group.values()])
            vector = torch.nn.functional.pad(vector, (0, -len(vector) % 4))
            half = len(vector) // 2
            partitions.append(vector[rank * half : (rank + 1) * half].clone())
            numels = [value.numel() for value in group.values()]
            cut = zip(group, cut_group([half, half], numels, [0] * len(numels)), strict=True)
            mappings.append(
                {
                    name: fragment_address(numel=piece.stop - piece.start, start=piece.start)
                    for name, pieces in cut
                    for piece in pieces
                    if piece.part == rank
                }
            )
        moments = {
            number: {"step": torch.tensor(2.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for number, p in enumerate(partitions)
        }
        optimizer = {
            "loss_scaler": LossScaler(1.0),
            "zero_stage": ZeroStageEnum(stage),
            "partition_count": 2 if stage == 3 else [2, 2],
            "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups": partitions,
            "optimizer_state_dict" if stage == 3 else "base_optimizer_state": {"state": moments, "param_groups": []},
            "param_slice_mappings": mappings,
            "ds_version": version("deepspeed"),
        }
        torch.save(
            {"optimizer_state_dict": optimizer, "ds_config": model_states["ds_config"], "ds_version": "0"},
            folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        if stage == 3:
            torch.save(model_states, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage != 3:
        torch.save(model_states, folder / "mp_rank_00_model_states.pt")
    state = {"version": 1, "step": 2, "world_size": 2, "engine": "deepspeed"}
    (step_folder / "trainer_state.json").write_text(json.dumps(state))
    files = {
        str(path.relative_to(step_folder)): {"bytes": path.stat().st_size, "crc32": plain_crc32(path)}
        for path in sorted(step_folder.rglob("*"))
        if path.is_file()
    }
    (step_folder / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))


def compare(theirs: Path, ours: Path) -> None:
    """In a process of its own: both folders must hold the same names and bits."""
    from safetensors.torch import load_file

    from trainer.convert.weights import same_bits

    left, right = (
        {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
        for folder in (theirs, ours)
    )
    if left.keys() != right.keys() or not all(same_bits(left[name], right[name]) for name in left):
        raise SystemExit(f"{theirs} and {ours} differ")


def main() -> int:
    """Print the table and what was missed; returns 1 if a target was."""
    if sys.argv[1:2] == ["write"]:
        write_checkpoint(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return 0
    if sys.argv[1:2] == ["compare"]:
        compare(Path(sys.argv[2]), Path(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", help="A shipped model size; demo for a smoke test, without targets.")
    parser.add_argument("--stage", type=int, choices=(2, 3), action="append", help="Default: both, one after another.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where to work; a temporary folder by default.")
    parser.add_argument("--output", type=Path, help="Markdown file for the tables.")
    given = parser.parse_args()
    lines = [
        f"Two ranks' checkpoint of `{given.size}` in bf16 with fp32 master weights, to fp32; {os.cpu_count()} cores "
        f"({platform.machine()}), Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        + f"; load average before: {os.getloadavg()[0]:.1f}; all files in the page cache."
    ]
    missed = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        for stage in given.stage or (2, 3):
            step_folder = Path(name) / f"zero{stage}" / "step-00000002"
            measure([sys.executable, __file__, "write", str(step_folder), given.size, str(stage)])
            measured = run(step_folder, Path(name) / "results", given.rounds)
            shutil.rmtree(step_folder)
            lines += ["", f"ZeRO-{stage}:", "", *table(measured)]
            missed += [f"ZeRO-{stage}: {text}" for text in failures(measured)]
    print("\n".join(lines))
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if given.size == "demo":
        return 0
    print("\n".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
