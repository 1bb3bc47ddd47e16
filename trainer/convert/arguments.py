"""`trainer convert`: its arguments and what it prints."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.arguments import RaisingParser
from trainer.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; complaints are raised as `ArgumentsError`."""
    parser = RaisingParser(
        prog="trainer convert",
        description="Turn a run, or one of its checkpoints, into a folder that from_pretrained loads.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        type=Path,
        help="A run folder (its newest complete checkpoint is taken) or a checkpoint folder.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="Folder to write; it appears whole or not at all.")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16 (default: fp32).")
    parser.add_argument("--max_shard_size", default="5GB", help="Largest weights file, such as 5GB (default: 5GB).")
    parser.add_argument(
        "--to",
        choices=("pretrained", "universal"),
        default="pretrained",
        help="What to write: a folder for from_pretrained, or DeepSpeed's universal checkpoint, with the state of the "
        "optimizer, for another DeepSpeed trainer (default: pretrained).",
    )
    parser.add_argument("--no_verify", action="store_true", help="Do not read the result back and compare it.")
    parser.add_argument("--overwrite", action="store_true", help="Replace OUT if it exists.")
    return parser


def main(words: Sequence[str]) -> int:
    """Convert and print what was written; returns the exit code 0. Raises `UserError`."""
    given = build_parser().parse_args(list(words))
    from trainer.convert.conversion import convert
    from trainer.convert.universal import convert_to_universal

    common = {"dtype": given.dtype, "verify": not given.no_verify, "overwrite": given.overwrite}
    try:
        if given.to == "universal":
            report = convert_to_universal(given.source, given.out, **common)
        else:
            report = convert(given.source, given.out, max_shard_size=given.max_shard_size, **common)
    except OSError as error:
        raise UserError(f"{given.out} was not written: {error}; nothing is left of it.") from error
    print(
        f"{given.out}: update {report.step:,}, {report.num_parameters / 1e6:.1f} M parameters in {given.dtype}, "
        f"{report.seconds:.1f} s{'' if given.no_verify else ', verified'}",
        file=sys.stderr,
    )
    return 0
