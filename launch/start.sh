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

# The launcher keeps a signal to itself or ends the ranks with it; sent to the ranks, each saves and ends with code 4.
# shellcheck disable=SC2329 # both are called by the traps below
children() { cat "/proc/$1/task/"*/children 2>/dev/null || true; }
# shellcheck disable=SC2329
to_ranks() { # SIGNAL
    local launcher rank
    for launcher in $(children "$runner"); do
        for rank in $(children "$launcher"); do kill -s "$1" "$rank" 2>/dev/null || true; done
    done
}
deepspeed --quiet ${NUM_RANKS:+--num_gpus "$NUM_RANKS"} --master_port "$port" "$@" &
runner=$!
trap 'to_ranks TERM' TERM INT
trap 'to_ranks USR1' USR1
code=0
wait "$runner" || code=$?
while kill -0 "$runner" 2>/dev/null; do # a trapped signal ends `wait` too
    code=0
    wait "$runner" || code=$?
done
exit "$code"
