"""The command: which checks are made, in which order, and the table."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.arguments import RaisingParser
from trainer.doctor.accounts import accounts
from trainer.doctor.cluster import network, slurm
from trainer.doctor.compilers import build_ops, compilers, ops
from trainer.doctor.findings import Finding
from trainer.doctor.gpus import gpus
from trainer.doctor.gradients import gradients
from trainer.doctor.storage import nvme_folder, output_folder, shared_memory
from trainer.doctor.versions import INCOMPLETE, versions


def main(words: Sequence[str]) -> int:
    """Print the findings; returns 0 when nothing is wrong, otherwise 2. Raises `ArgumentsError`."""
    arguments = _parser().parse_args(list(words))
    wrong = False
    for finding in _all_findings(arguments):
        print(f"{finding.verdict:5}  {finding.subject:14} {finding.found}", flush=True)
        if finding.remedy:
            print(f"       {'':14} -> {finding.remedy}", flush=True)
        wrong = wrong or finding.verdict == "WRONG"
    return 2 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = RaisingParser(
        prog="trainer doctor", allow_abbrev=False,
        description="Check versions, compilers, GPUs, file systems, cluster and logins, and on up to two ranks that "
        "they reach each other and that DeepSpeed gets gradients right.",
        epilog="exit codes: 0 nothing is wrong (a note may be worth a look), 2 something needs the remedy shown",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs go (default: runs)"
    )
    parser.add_argument("--nvme_path", type=Path, metavar="DIR", help="where a configuration with NVMe offload writes")
    parser.add_argument(
        "--build_ops", action="store_true",
        help="compile DeepSpeed's extensions for offload now, which otherwise the first run does",
    )  # fmt: skip
    return parser


def _all_findings(arguments: argparse.Namespace) -> Iterator[Finding]:
    """The rest needs what `versions` looks for."""
    found = list(versions())
    yield from found
    if any(finding.remedy == INCOMPLETE for finding in found):
        return
    yield from gpus()
    yield from compilers()
    yield from build_ops() if arguments.build_ops else ops()
    yield from output_folder(arguments.output_dir)
    if arguments.nvme_path is not None:
        yield from nvme_folder(arguments.nvme_path)
    yield from shared_memory()
    yield from slurm()
    yield from network()
    yield from accounts()
    yield from gradients()
