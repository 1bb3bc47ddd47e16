"""The `README.md` of a converted folder: what it is, how it was made, and how to load and fine-tune it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.layout import CHECKPOINTS_FOLDER, CONFIG_FILE, METRICS_FILE

Settings = Mapping[str, Any]

HEAD = """\
---
library_name: transformers
pipeline_tag: feature-extraction
tags:
- {model_type}
- speech
- self-supervised-pretraining
---

# {architecture}, step {step}

A speech encoder pre-trained without transcripts by wav2vec 2.0 (Baevski et al., 2020, https://arxiv.org/abs/2006.11477),
taken after {step} updates: {num_parameters:,} parameters in {dtype}. It has no vocabulary; fine-tune it before use in
speech recognition.
"""

USE = """
## Loading

```python
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC, AutoModelForPreTraining

folder = "path/to/this/folder"
extractor = AutoFeatureExtractor.from_pretrained(folder)  # audio at {sampling_rate} Hz
encoder = AutoModel.from_pretrained(folder)  # features of speech
pretrained = AutoModelForPreTraining.from_pretrained(folder)  # with quantizer and projections, to train on
recognizer = AutoModelForCTC.from_pretrained(folder)  # with a new, untrained output layer, to fine-tune
```

## Fine-tuning

For speech recognition by characters, from batches of your own: lists of waveforms at {sampling_rate} Hz and of their
transcripts.

```python
import torch
from transformers import AutoFeatureExtractor, AutoModelForCTC

folder = "path/to/this/folder"
characters = " 'abcdefghijklmnopqrstuvwxyz"  # those of your transcripts; output 0 is the blank of CTC
extractor = AutoFeatureExtractor.from_pretrained(folder)
model = AutoModelForCTC.from_pretrained(
    folder,
    dtype=torch.float32,
    vocab_size=len(characters) + 1,
    pad_token_id=0,
    ctc_loss_reduction="mean",
    mask_time_prob=0.05,  # pre-training masks far more
)
model.freeze_feature_encoder()
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-5)
for waveforms, transcripts in batches:
    inputs = extractor(waveforms, sampling_rate={sampling_rate}, padding=True, return_tensors="pt")
    labels = [torch.tensor([characters.index(c) + 1 for c in text]) for text in transcripts]
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained("fine-tuned")
```
"""

# What a reader needs to judge or repeat a run; paths, intervals and other matters of one machine are left out.
SETTINGS = (
    *("max_train_steps", "num_warmup_steps", "learning_rate", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("per_device_train_batch_size", "max_batch_seconds", "gradient_accumulation_steps"),
    *("max_duration_in_seconds", "min_duration_in_seconds"),
    *("max_gumbel_temperature", "min_gumbel_temperature", "gumbel_temperature_decay"),
    *("feature_grad_mult", "feature_penalty_weight", "global_diversity", "freeze_feature_encoder"),
    *("init_from", "bf16", "deepspeed", "seed"),
)
METRICS = ("loss", "contrastive_loss", "diversity_loss", "accuracy", "code_perplexity", "prob_perplexity")


class RunRecord(NamedTuple):
    """What a run folder tells of the updates up to a checkpoint; empty where it tells nothing."""

    settings: Settings
    trained_hours: float | None
    validation: Settings


def read_run(checkpoint: Path, step: int) -> RunRecord:
    """The settings and metrics beside a checkpoint of a run (`RUN/checkpoints/step-N`), as far as they are there.

    The card is an aside to the weights: a file that is missing or unreadable leaves its part out.
    """
    folder = checkpoint.resolve().parent
    if folder.name != CHECKPOINTS_FOLDER:
        return RunRecord({}, None, {})
    lines = [line for line in _metrics(folder.parent / METRICS_FILE) if line["step"] <= step]
    seconds = sum(_number(line.get("audio_seconds")) for line in lines if line.get("split") == "train")
    validations = [line for line in lines if line.get("split") == "validation"]
    return RunRecord(
        settings=_settings(folder.parent / CONFIG_FILE),
        trained_hours=seconds / 3600 if seconds else None,
        validation=max(validations, key=lambda line: line["step"], default={}),
    )


def model_card(
    config: Settings, run: RunRecord, *, step: int, num_parameters: int, dtype: str, sampling_rate: int
) -> str:
    """The text of the card; the front matter is what the Hub reads."""
    head = HEAD.format(
        architecture=(config.get("architectures") or ["Model"])[0],
        model_type=config.get("model_type", "wav2vec2"),
        step=step,
        num_parameters=num_parameters,
        dtype=dtype,
    )
    # Not `format`: the code has braces of its own.
    return head + "".join(_training(run)) + USE.replace("{sampling_rate}", str(sampling_rate))


def _training(run: RunRecord) -> Iterator[str]:
    if run.trained_hours is not None:
        data = run.settings.get("dataset_name") or []
        names = [f"`{Path(str(name)).name}`" for name in (data if isinstance(data, list) else [data])]
        source = f" of {', '.join(names)}" if names else ""
        yield f"\n## Training\n\nTrained on {run.trained_hours:,.2f} hours of audio{source}, repetitions counted.\n"
    elif run.settings:
        yield "\n## Training\n"
    rows = [(key, run.settings[key]) for key in SETTINGS if run.settings.get(key) is not None]
    if rows:
        yield "\n| Setting | Value |\n|---|---|\n" + "".join(f"| `{key}` | {_shown(value)} |\n" for key, value in rows)
    found = [(key, run.validation[key]) for key in METRICS if isinstance(run.validation.get(key), int | float)]
    if found:
        yield f"\n## Validation\n\nAfter {run.validation['step']} updates:\n\n| Metric | Value |\n|---|---|\n"
        yield "".join(f"| `{key}` | {value:.4g} |\n" for key, value in found)


def _shown(value: object) -> str:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _settings(path: Path) -> Settings:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # a run that goes on may be writing its last line
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
