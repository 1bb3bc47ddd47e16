#!/usr/bin/env bash
# Start the ranks of a run with the deepspeed launcher, NUM_RANKS of them: launch/start.sh FILE [ARGUMENT ...]
# Without NUM_RANKS the launcher starts one rank per GPU, and on a machine without GPUs one per NUMA node.
set -euo pipefail

# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if ! deepspeed=$(command -v deepspeed); then
    echo "deepspeed is not installed here; run: bash launch/setup.sh" >&2
    exit 2
fi
python=$(dirname "$deepspeed")/python3
for argument in "$@"; do
    # Help needs no ranks, and starting them takes seconds.
    case $argument in -h | --help) exec "$python" "$1" --help ;; esac
done
# A free port: with the launcher's fixed one, the second run on a machine fails.
port=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
exec deepspeed --quiet ${NUM_RANKS:+--num_gpus "$NUM_RANKS"} --master_port "$port" "$@"
