"""From a checkpoint of a run to DeepSpeed's universal checkpoint, which any DeepSpeed trainer of this model can load.

What `python -m deepspeed.checkpoint.ds_to_universal` writes (as of 0.19.8), without DeepSpeed and one tensor at a time,
and loadable under ZeRO-1, 2 and 3 alike:

    OUT/latest_universal                                  the name of the folder beside it
    OUT/universal/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt
    OUT/universal/zero/optimizer_state.pt                 settings of the parameter groups
    OUT/universal/mp_rank_00_model_states.pt              counters, for ZeRO-1 and 2
    OUT/universal/zero_pp_rank_0_mp_rank_00_model_states.pt    the same for ZeRO-3

Another trainer loads it with `"checkpoint": {"load_universal": true}` in its DeepSpeed configuration and
`engine.load_checkpoint(OUT)`. DeepSpeed restores neither buffers nor frozen parameters from universal checkpoints; they
lie in `zero/NAME/fp32.pt` for whoever wants them.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.convert.checkpoint import Checkpoint, find_checkpoint, open_checkpoint, read_json
from trainer.convert.conversion import ConversionReport
from trainer.convert.errors import ConversionError
from trainer.convert.safe_load import StoredTensor, safe_load
from trainer.convert.training_state import TrainingState, read_training_state
from trainer.convert.weights import same_bits, whole
from trainer.convert.writer import check_destination, published_folder
from trainer.layout import TRAINER_STATE_FILE

DEEPSPEED_VERSION = "0.19.8"  # whose layout this is; DeepSpeed asks for one
UNIVERSAL_VERSION = 0.4
TAG = "universal"
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def convert_to_universal(
    source: Path, out: Path, *, dtype: str | None = None, verify: bool = True, overwrite: bool = False
) -> ConversionReport:
    """Write the weights and the state of AdamW of a checkpoint into `out`, which appears whole or not at all.

    Args:
        source, out, overwrite: as for `convert`.
        dtype: fp32 or None; training goes on from the fp32 weights.
        verify: check the input's checksums, and read every file back and compare it.

    Raises:
        ConversionError: an argument or the checkpoint is wrong; `out` is then as it was.
    """
    started = time.monotonic()
    if dtype not in (None, "fp32", "float32"):
        raise ConversionError(f"dtype ({dtype}) must be fp32 for a universal checkpoint, from which training goes on.")
    folder = find_checkpoint(source)
    check_destination(out, folder, overwrite=overwrite)
    checkpoint = open_checkpoint(folder, checksums=verify, tensors=True)
    if not (folder / TRAINER_STATE_FILE).is_file():
        raise ConversionError(
            f"{folder} was not saved by this program, and --to universal takes nothing else; DeepSpeed's own tool is "
            "`python -m deepspeed.checkpoint.ds_to_universal`."
        )
    state = read_training_state(folder, engine=checkpoint.engine, world_size=checkpoint.world_size)
    with published_folder(out, overwrite=overwrite) as staging:
        for name in ("config.json", "preprocessor_config.json"):
            text = json.dumps(read_json(folder / name), indent=2, sort_keys=True)
            (staging / name).write_text(text + "\n", encoding="utf-8")
        (staging / TAG / "zero").mkdir(parents=True)
        for path, content in _files(state, checkpoint):
            _save(staging / TAG / path, content, verify=verify)
        (staging / "latest_universal").write_text(TAG, encoding="utf-8")
        paths = sorted(path for path in staging.rglob("*") if path.is_file())
        sizes = {path.relative_to(staging).as_posix(): path.stat().st_size for path in paths}
    return ConversionReport(
        checkpoint=folder,
        out=out,
        step=checkpoint.step,
        engine=checkpoint.engine,
        dtype="float32",
        num_parameters=sum(math.prod(weight.shape) for weight in state.weights),
        num_bytes=sum(sizes.values()),
        files=tuple(sizes),
        verified=verify,
        seconds=time.monotonic() - started,
    )


def _files(state: TrainingState, checkpoint: Checkpoint) -> Iterator[tuple[Path, dict[str, Any] | torch.Tensor]]:
    """Path and content of every file of the tag, made when it is its turn."""
    step = torch.tensor(float(state.moments.num_updates))
    for weight in state.weights:
        if Path(weight.name).name != weight.name or weight.name in ("", ".."):
            raise ConversionError(f"{checkpoint.folder}: {weight.name!r} is not the name of a weight; do not trust it.")
        folder = Path("zero") / weight.name
        yield folder / "fp32.pt", {"param": weight.read().float()}
        if weight.name in state.moments.of["exp_avg"]:
            for key, moments in state.moments.of.items():
                yield folder / f"{key}.pt", {"param": moments[weight.name].read()}
            yield folder / "step.pt", step
    groups = [
        {
            key: whole(key, value).read() if isinstance(value, StoredTensor) else value
            for key, value in group.items()
            if key != "params"
        }
        for group in state.moments.groups
    ]
    # ZeRO-3 gives every group the settings of the first one; those that differ are left to the new engine
    shared = {key: value for key, value in groups[0].items() if all(group.get(key) == value for group in groups)}
    yield (
        Path("zero") / "optimizer_state.pt",
        {
            "ds_version": DEEPSPEED_VERSION,
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [shared]},
        },
    )
    counters = {
        "module": {},
        "lr_scheduler": None,
        "global_steps": checkpoint.step,
        "skipped_steps": checkpoint.step - state.moments.num_updates,
        "dp_world_size": checkpoint.world_size,
        "mp_world_size": 1,
        "ds_version": DEEPSPEED_VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION},
    }
    for name in MODEL_FILES:
        yield Path(name), counters


def _save(path: Path, content: dict[str, Any] | torch.Tensor, *, verify: bool) -> None:
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, dict) and isinstance(content.get("param"), torch.Tensor):
        torch.save(content, path)
        if verify and not same_bits(whole("param", safe_load(path)["param"]).read(), content["param"]):
            raise ConversionError(f"{path.name} of {path.parent.name} differs from the checkpoint; convert again.")
        return
    torch.save(content, path)
