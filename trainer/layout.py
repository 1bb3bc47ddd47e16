"""Names inside a run folder and a checkpoint, shared by what writes them and what reads them."""

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.tsv"
CHECKPOINTS_FOLDER = "checkpoints"
LOCK_FILE = ".lock"

STEP_PREFIX = "step-"
UNFINISHED_PREFIX = ".unfinished-"
REMOVED_PREFIX = ".removed-"
SUPERSEDED_PREFIX = "superseded-"
MANIFEST_FILE = "manifest.json"
TRAINER_STATE_FILE = "trainer_state.json"
DEEPSPEED_FOLDER = "deepspeed"
PLAIN_MODEL_FILE = "model.safetensors"
PLAIN_OPTIMIZER_FILE = "optimizer.pt"
OPTIMIZER_NAMES_KEY = "names"  # in that file, beside what torch saves: the parameters in the optimizer's order
SWAPPED_KEY = "swapped_groups"  # in the model states of DeepSpeed: which groups of the optimizer were on NVMe


def swapped_folder(rank: int) -> str:
    """Where, beside DeepSpeed's shards, a checkpoint holds what a rank had on NVMe."""
    return f"offloaded_tensors/rank{rank:02d}"


def is_inside(name: str) -> bool:
    """Whether a relative path from a file's contents stays below the folder it is relative to."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def step_folder_name(step: int) -> str:
    """`step-00001000` for update 1,000."""
    return f"{STEP_PREFIX}{step:08d}"
