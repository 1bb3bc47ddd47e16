#!/usr/bin/env bash
# Set up, lint, type-check and test: bash tests/run.sh [PYTEST ARGUMENT ...]
set -euo pipefail
case ${1:-} in -h | --help)
    sed -n '2,/^[^#]/s/^# //p' "$0"
    exit 0
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh test
# shellcheck source=launch/env.sh
. launch/env.sh
# Tests reach for no network: neither the Hub nor a tracker.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline

shell_files() {
    local file
    shellcheck --external-sources launch/{cluster,demo,env,setup,start}.sh tests/run.sh tests/slurm/nodes.sh .ci/run || return
    for file in launch/*.sbatch; do
        if [ -e "$file" ]; then shellcheck --external-sources "$file" || return; fi
    done
    # The bash half of the files that are Python too ends where the string does.
    for file in launch/pretrain_*.sh; do
        sed '/^":"""$/q' "$file" | shellcheck --shell bash - || return
    done
}

failed=()
check() { # NAME COMMAND ...
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}
check "ruff check" ruff check
check "ruff format" ruff format --check
check "mypy" mypy
check "shellcheck" shell_files
if [ ${#failed[@]} -gt 0 ]; then
    (IFS=,; echo "failed: ${failed[*]}; tests not run" >&2)
    exit 1
fi
exec python -m pytest "$@"
