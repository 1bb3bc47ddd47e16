"""Started on one CPU rank by `test_universal.py`: DeepSpeed itself loads universal checkpoints that we wrote.

    load_universal.py FOLDER SOURCE:TARGET ...

For each pair it loads FOLDER/<SOURCE> into the engine of <TARGET> in `save_checkpoints.RUNS` and writes what that then
holds to FOLDER/<SOURCE>:<TARGET>.safetensors.
"""

import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file

from tests.unit.convert.save_checkpoints import (
    RUNS,
    build,
    deepspeed_config,
    full_moments,
    full_state_dict,
    parameter_groups,
)


def load(folder: Path, source: str, target: str) -> None:
    model = build(RUNS[source]._replace(bf16=RUNS[target].bf16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    config = deepspeed_config(RUNS[target]) | {"checkpoint": {"load_universal": True}}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    path, _ = engine.load_checkpoint(str(folder / source))
    assert path is not None
    adam = engine.optimizer.optimizer
    steps = {f"step/{number}": torch.tensor(float(state["step"])) for number, state in enumerate(adam.state.values())}
    save_file(full_state_dict(engine) | full_moments(engine) | steps, folder / f"{source}:{target}.safetensors")
    assert engine.global_steps == 2 and engine.skipped_steps == 0
    engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for pair in sys.argv[2:]:
        load(Path(sys.argv[1]), *pair.split(":"))
