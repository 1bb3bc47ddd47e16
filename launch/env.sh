# shellcheck shell=bash
# Sourced, not executed, by the other scripts and by anyone: . launch/env.sh
# It sets no shell options, which would outlive it in an interactive shell. What is already set stays.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

if [ -x "$_root/.venv/bin/python" ]; then
    # First in PATH: DeepSpeed looks up ninja and its ranks look up python there.
    case ":$PATH:" in *":$_root/.venv/bin:"*) ;; *) export PATH="$_root/.venv/bin:$PATH" ;; esac
    # Compiled extensions of different versions must not share a folder; trainer/run/extensions.py says why and where.
    if _folder=$(PYTHONPATH="$_root" "$_root/.venv/bin/python" -m trainer.run.extensions 2>/dev/null); then
        export TORCH_EXTENSIONS_DIR="$_folder"
    fi
fi
# Each rank would otherwise start a thread per core, and ranks that share cores slow each other down several times over.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    _threads=$(($(getconf _NPROCESSORS_ONLN) / ${NUM_RANKS:-$(getconf _NPROCESSORS_ONLN)}))
    export OMP_NUM_THREADS=$((_threads > 0 ? _threads : 1))
fi
# Nothing here tokenizes; this only stops a warning in every forked data loader worker.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

unset _root _folder _threads
