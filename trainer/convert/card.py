"""The `README.md` of a converted folder: what it is and how to load it."""

TEMPLATE = """\
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

```python
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC, AutoModelForPreTraining

folder = "path/to/this/folder"
extractor = AutoFeatureExtractor.from_pretrained(folder)  # audio at {sampling_rate} Hz
encoder = AutoModel.from_pretrained(folder)  # features of speech
pretrained = AutoModelForPreTraining.from_pretrained(folder)  # with quantizer and projections, to train on
recognizer = AutoModelForCTC.from_pretrained(folder)  # with a new, untrained output layer, to fine-tune
```
"""


def model_card(
    *, architecture: str, model_type: str, step: int, num_parameters: int, dtype: str, sampling_rate: int
) -> str:
    """The text of the card; the front matter is what the Hub reads."""
    return TEMPLATE.format(
        architecture=architecture,
        model_type=model_type,
        step=step,
        num_parameters=num_parameters,
        dtype=dtype,
        sampling_rate=sampling_rate,
    )
