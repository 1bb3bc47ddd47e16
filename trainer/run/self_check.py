"""A start-up check that DeepSpeed hands the gradient over as it is: tiny, exact, on the run's own settings.

DeepSpeed 0.18.3 divides the gradient of a forward pass that returns several outputs by the accumulation steps, and
says nothing. A run that learns from gradients 16 times too small looks like a run with a bad learning rate.

`python -m trainer.run.self_check` runs it for every ZeRO stage, after an all-reduce, on one rank or under a launcher;
`trainer doctor` does.
"""

import math
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.ending import leave
from trainer.errors import UserError
from trainer.run.ds_config import resolve_ds_config
from trainer.run.engine import Engine, build_engine, is_main_process, launched_ranks, probe_engine

_SIZE = 8
_MAX_POSITIONS = 256  # of the window with something to add up: bf16 counts that far without loss
_TOLERANCE = 0.05  # a mean over ranks is rounded to bf16; what this looks for are factors


class _Output(NamedTuple):
    """As `LossTerms`: a tuple in which only the first member carries a graph."""

    loss: Tensor
    num_values: Tensor


class _Probe(nn.Module):
    """A dot product: its gradient is its input, whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(_SIZE, 1))

    def forward(self, values: Tensor) -> _Output:
        loss = (values.to(self.weight.dtype) * self.weight[:, 0]).sum()
        return _Output(loss, torch.ones((), device=values.device))


def check_gradient_scale(engine: Engine, ds_config: dict[str, Any]) -> float:
    """Run one window of a probe through DeepSpeed under `ds_config`; the factor by which its gradient norm is wrong.

    Every rank calls it. Only the norm is compared, so this finds a wrong scale, and in small windows a micro-batch that
    is lost or counted twice.

    Raises:
        UserError: the factor is not 1.
    """
    num_micro_batches: int = ds_config["gradient_accumulation_steps"]
    probe = probe_engine(engine, _Probe(), ds_config)
    num_targets = float(engine.world_size)  # the loss is then scaled by 1, which is exact
    for number in range(num_micro_batches):
        values = _values(engine.rank * num_micro_batches + number)
        with probe.micro_batch(last=number == num_micro_batches - 1):
            probe.backward(probe.model(values.to(engine.device)).loss, num_targets)
    found = probe.step().grad_norm
    positions = range(num_micro_batches * engine.world_size)
    expected = float(torch.stack([_values(position) for position in positions]).sum(dim=0).norm() / num_targets)
    factor = found / expected
    if not math.isclose(factor, 1.0, rel_tol=_TOLERANCE):
        raise UserError(
            f"DeepSpeed {version('deepspeed')} gets gradients wrong by a factor of {factor:.4g} (ZeRO stage "
            f"{ds_config['zero_optimization']['stage']}, {num_micro_batches} micro-batches on {engine.world_size} "
            "rank(s)); training would go on with it silently. Install the version in constraints.txt."
        )
    return factor


def _values(position: int) -> Tensor:
    """The micro-batch at a position of the window: a one that moves on with the position, far out all zeros.

    DeepSpeed adds gradients up in bf16 between ranks, whatever it accumulates in.
    """
    values = torch.zeros(_SIZE)
    values[position % _SIZE] = float(position < _MAX_POSITIONS)
    return values


def _all_reduce(engine: Engine) -> float:
    """Add up 64 MB over all ranks; gigabytes of it per second. Raises `UserError` where the sum is wrong."""
    values = torch.full((1 << 24,), float(engine.rank + 1), device=engine.device)
    engine.sum_over_ranks(values)  # makes the connections
    start = time.monotonic()
    total = engine.sum_over_ranks(values)
    expected = engine.world_size * (engine.world_size + 1) / 2
    if not bool((total == expected).all()):  # waits for the device too
        raise UserError(
            f"an all-reduce over {engine.world_size} rank(s) gives {total[0].item()} instead of {expected}; check the "
            "network and its driver, on one machine with NCCL_P2P_DISABLE=1."
        )
    return values.nbytes / (time.monotonic() - start) / 1e9


def main() -> None:
    """Check an all-reduce and stages 1 to 3 with four micro-batches; a line each on rank 0, an error on a failure."""
    bf16 = torch.cuda.is_available()
    configs = [
        resolve_ds_config(
            {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}},
            source=f"ZeRO stage {stage}", bf16=bf16, max_grad_norm=0.1, gradient_accumulation_steps=4,
            micro_batch_size=1, world_size=launched_ranks(),
        )
        for stage in (1, 2, 3)
    ]  # fmt: skip
    model = _Probe()
    engine = build_engine(
        model, torch.optim.AdamW(model.parameters(), fused=True), ds_config=configs[0], bf16=bf16, max_grad_norm=0.1,
        log_with=None, project_folder=Path(tempfile.gettempdir()),
    )  # fmt: skip
    gigabytes_per_second = _all_reduce(engine)
    if engine.is_main:
        print(f"all-reduce right, {gigabytes_per_second:.1f} GB/s", flush=True)
    for config in configs:
        factor = check_gradient_scale(engine, config)
        if engine.is_main:
            stage = config["zero_optimization"]["stage"]
            print(f"ZeRO stage {stage}: gradient norm {factor:.6f} x the exact one", flush=True)
    engine.close()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        if is_main_process():
            print(error, file=sys.stderr)
        leave(2)
    leave(0)
