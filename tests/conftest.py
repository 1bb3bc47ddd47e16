"""Settings that libraries read when they are imported: no test reaches for a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
