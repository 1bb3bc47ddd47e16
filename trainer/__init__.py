"""Self-supervised pre-training of speech models (wav2vec 2.0), scaled by DeepSpeed."""

__version__ = "0.1.0"
