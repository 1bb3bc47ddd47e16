#!/usr/bin/env bash
# Pre-train a small model on the shipped speech with two ranks, convert it and load it with stock transformers.
# DATA=folder trains on your own audio instead; arguments are flags of `trainer pretrain` and win over the demo's.
# A demo that was stopped goes on where its last checkpoint is.
set -euo pipefail
case ${1:-} in -h | --help)
    sed -n '2,/^[^#]/s/^# //p' "$0"
    exit 0
    ;;
esac
if [ -n "${DATA:-}" ]; then DATA=$(realpath -m -- "$DATA"); fi # before the folder changes
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
export NUM_RANKS=2
# shellcheck source=launch/env.sh
. launch/env.sh

mkdir -p runs
exec 8>>runs/.demo.lock
if command -v flock >/dev/null && ! flock --nonblock 8; then
    echo "another demo is running in this folder; wait for it or stop it" >&2
    exit 2
fi

if [ -n "${DATA:-}" ]; then
    data=(--dataset_name "$DATA" --validation_split_percentage 10)
    first=runs/demo-$(basename "$DATA") # never continue a run on other data
else
    data=(--dataset_name tests/corpus/train --validation_dataset_name tests/corpus/validation)
    first=runs/demo
fi

# The first folder that is free or holds a demo to continue. `pretrained` is what the demo makes last.
run=$first
number=1
resume=()
while [ -e "$run" ]; do
    if [ -e "$run/pretrained" ]; then
        echo "$run holds a finished demo."
    elif compgen -G "$run/checkpoints/step-*" >/dev/null; then
        echo "$run holds a demo that was stopped; continuing it."
        resume=(--resume latest)
        break
    fi
    number=$((number + 1))
    run=$first-$number
done
echo "Training in $run."

bash launch/start.sh --module trainer pretrain --config demo "${data[@]}" \
    --output_dir "$run" --deepspeed zero2 "${resume[@]}" "$@"
python -m trainer convert "$run" "$run/pretrained"

python - "$run" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import Wav2Vec2ForPreTraining
from transformers.utils import logging

logging.disable_progress_bar()
run = Path(sys.argv[1])
model = Wav2Vec2ForPreTraining.from_pretrained(run / "pretrained")
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
rows = [row for row in rows if row["split"] == "validation"]
chance = 1 / (model.config.num_negatives + 1)

print()
print(f"transformers loads {run}/pretrained as {type(model).__name__} with {model.num_parameters():,} parameters.")
print(f"On validation speech, chance being an accuracy of {chance:.4f}:")
for row in [rows[0], rows[-1]] if rows else []:
    print(
        f"  after {row['step']:>5} updates: accuracy {row['accuracy']:.4f} ({row['accuracy'] / chance:.1f} x chance), "
        f"contrastive loss {row['contrastive_loss']:.3f}, code perplexity {row['code_perplexity']:.1f}"
    )
print("Where things are:")
for name, what in {
    "pretrained": "the model, for from_pretrained",
    "metrics.jsonl": "every logged and validated update",
    "config.yaml": "the settings; pass it back with --config",
    "checkpoints": "what --resume latest continues from",
    "report.html": "curves",
}.items():
    if (run / name).exists():
        print(f"  {run / name!s:<32} {what}")
PYTHON
