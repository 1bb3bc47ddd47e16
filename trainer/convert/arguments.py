"""`trainer convert`: its arguments and what it prints."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.convert.errors import ConversionError
from trainer.convert.hub import check_repository_name, push_to_hub
from trainer.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Raises its complaints. `trainer.arguments` has its like, but brings every flag of training, which takes time."""

    def error(self, message: str) -> NoReturn:
        raise ConversionError(message)


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; complaints are raised as `ConversionError`."""
    parser = _Parser(
        prog="trainer convert",
        description="Turn a run, or one of its checkpoints, into a folder that from_pretrained loads.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        type=Path,
        help="A run folder (its newest complete checkpoint is taken), a checkpoint folder, or what another trainer "
        "saved through DeepSpeed: the folder of accelerate's save_state, or of DeepSpeed's save_checkpoint.",
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
    parser.add_argument(
        "--config_from",
        metavar="FOLDER",
        type=Path,
        help="Folder with config.json and preprocessor_config.json: checkpoints of other trainers lack them.",
    )
    parser.add_argument("--push_to_hub", metavar="REPO", help="Upload OUT to this repository of the Hub.")
    parser.add_argument("--hub_token", metavar="TOKEN", help="Token for it (default: HF_TOKEN or `hf auth login`).")
    parser.add_argument("--hub_public", action="store_true", help="If it is a new repository, let everyone read it.")
    return parser


def main(words: Sequence[str]) -> int:
    """Convert, print what was written and upload it if asked to; returns the exit code 0. Raises `UserError`."""
    given = build_parser().parse_args(list(words))
    if given.push_to_hub is not None:
        check_repository_name(given.push_to_hub)
    common = {"dtype": given.dtype, "verify": not given.no_verify, "overwrite": given.overwrite}
    try:
        if given.to == "universal":
            from trainer.convert.universal import convert_to_universal

            report = convert_to_universal(given.source, given.out, **common)
        else:
            from trainer.convert.conversion import convert

            report = convert(
                given.source, given.out, max_shard_size=given.max_shard_size, config_from=given.config_from, **common
            )
    except OSError as error:
        raise UserError(f"{given.out} was not written: {error}; nothing is left of it.") from error
    print(
        f"{given.out}: update {report.step:,}, {report.num_parameters / 1e6:.1f} M parameters in {given.dtype}, "
        f"{report.seconds:.1f} s{'' if given.no_verify else ', verified'}",
        file=sys.stderr,
    )
    if given.push_to_hub is not None:
        address = push_to_hub(
            given.out, given.push_to_hub, token=given.hub_token, public=given.hub_public, step=report.step
        )
        print(f"uploaded to {address}", file=sys.stderr)
    return 0
