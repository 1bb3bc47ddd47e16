"""The Python half of `launch/pretrain_*.sh`: environment variables and a bare data folder become flags."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.arguments import shipped_recipes
from trainer.layout import CHECKPOINTS_FOLDER, STEP_PREFIX

HELP = """\
usage: bash launch/pretrain_{recipe}.sh [DATA] [FLAG ...]
       deepspeed [--num_gpus N] launch/pretrain_{recipe}.sh [DATA] [FLAG ...]

Pre-train with the recipe `{recipe}`. DATA and the flags win over these environment variables:
  DATA       audio to train on (--dataset_name)
  OUTPUT     run folder (--output_dir), default runs/NAME of the shipped recipe
  DS_CONFIG  DeepSpeed configuration (--deepspeed), default the recipe's: zero2
  RECIPE     recipe (--config), default {recipe}
  NUM_RANKS  ranks on this machine, with `bash` only; default one per GPU

The flags are those of `trainer pretrain`:
"""


def pretrain_arguments(argv: Sequence[str], environ: Mapping[str, str], recipe: str) -> list[str]:
    """Arguments of `trainer` for one rank. Defaults come first: of a flag given twice the last one counts."""
    # The deepspeed launcher puts its own flag first; LOCAL_RANK in the environment says the same.
    given = [argument for argument in argv if not argument.startswith(("--local_rank=", "--local-rank="))]
    if given and not given[0].startswith("-"):
        given[:1] = ["--dataset_name", given[0]]
    defaults = {"--config": environ.get("RECIPE") or recipe}
    chosen = _last_value("--config", given) or defaults["--config"]
    if output := environ.get("OUTPUT") or (f"runs/{chosen}" if chosen in shipped_recipes() else None):
        defaults["--output_dir"] = output  # a recipe of the user's own may name the folder itself
    for variable, name in (("DS_CONFIG", "--deepspeed"), ("DATA", "--dataset_name")):
        if value := environ.get(variable):
            defaults[name] = value
    arguments = ["pretrain", *(part for pair in defaults.items() for part in pair), *given]
    return [*arguments, *_resume(arguments, environ)]


def _resume(arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """A job that SLURM started before goes on with its newest checkpoint.

    But for one that named another run's checkpoint and has none of its own yet, which `latest` would start at nothing.
    """
    if int(environ.get("SLURM_RESTART_COUNT") or 0) == 0:
        return []
    checkpoints = Path(_last_value("--output_dir", arguments) or "") / CHECKPOINTS_FOLDER
    if _last_value("--resume", arguments) not in (None, "latest") and not any(checkpoints.glob(f"{STEP_PREFIX}*")):
        return []
    return ["--resume", "latest"]


def _last_value(flag: str, arguments: Sequence[str]) -> str | None:
    """Value of a flag given as `FLAG VALUE` or `FLAG=VALUE`, the last one; None where it is not given."""
    value = None
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        elif argument == flag and position + 1 < len(arguments):
            value = arguments[position + 1]
    return value


def pretrain(recipe: str, argv: Sequence[str]) -> int:
    """Run one rank of `launch/pretrain_RECIPE.sh`; the value is the exit code."""
    if {"-h", "--help"} & set(argv):
        if os.environ.get("RANK", "0") != "0":
            return 0  # one rank's help is enough
        print(HELP.format(recipe=recipe), flush=True)
        argv = ["--help"]
    from trainer.cli import main

    return main(pretrain_arguments(argv, os.environ, recipe))
