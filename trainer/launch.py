"""The Python half of `launch/pretrain_*.sh`: environment variables and a bare data folder become flags."""

import os
from collections.abc import Mapping, Sequence

HELP = """\
usage: bash launch/pretrain_{recipe}.sh [DATA] [FLAG ...]
       deepspeed [--num_gpus N] launch/pretrain_{recipe}.sh [DATA] [FLAG ...]

Pre-train with the recipe `{recipe}`. DATA and the flags win over these environment variables:
  DATA       audio to train on (--dataset_name)
  OUTPUT     run folder (--output_dir), default runs/{recipe}
  DS_CONFIG  DeepSpeed configuration (--deepspeed), default zero2
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
    defaults = {
        "--config": environ.get("RECIPE") or recipe,
        "--output_dir": environ.get("OUTPUT") or f"runs/{recipe}",
        "--deepspeed": environ.get("DS_CONFIG") or "zero2",
    }
    if data := environ.get("DATA"):
        defaults["--dataset_name"] = data
    return ["pretrain", *(part for pair in defaults.items() for part in pair), *given]


def pretrain(recipe: str, argv: Sequence[str]) -> int:
    """Run one rank of `launch/pretrain_RECIPE.sh`; the value is the exit code."""
    if {"-h", "--help"} & set(argv):
        if os.environ.get("RANK", "0") != "0":
            return 0  # one rank's help is enough
        print(HELP.format(recipe=recipe), flush=True)
        argv = ["--help"]
    from trainer.cli import main

    return main(pretrain_arguments(argv, os.environ, recipe))
