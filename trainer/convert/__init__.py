"""Checkpoints of a run -> ordinary `save_pretrained` folders, without DeepSpeed and without running pickled code."""
