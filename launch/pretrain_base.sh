#!/usr/bin/env bash
""":"
# Bash and Python both run this file: `bash FILE` starts the ranks, and each rank is `python FILE`, as is every rank of
# `deepspeed FILE`. For bash the first line is the command `:`; for Python all lines up to the last one are a string.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/start.sh" "${BASH_SOURCE[0]}" "$@"
":"""

import sys
from pathlib import Path

# A worker process that is spawned imports this file again and must not train.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from trainer.ending import leave
    from trainer.launch import pretrain

    leave(pretrain("base", sys.argv[1:]))
