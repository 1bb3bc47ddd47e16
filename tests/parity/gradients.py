"""The same window of utterances through every engine and every split of it: do the gradients agree?

    python tests/parity/gradients.py              # all of it, as Markdown tables; some minutes on two cores
    python tests/parity/gradients.py --fp32_only

Eight utterances with fixed masks, which have unequal numbers of targets, make one window. It is split into
accumulation steps x ranks micro-batches and run by {plain PyTorch, ZeRO-2, ZeRO-3, both with CPU offload}. What is
compared is the gradient before clipping, as one vector over all parameters: |g - r| / |r|.

The reference r is computed in one process with `torch.autograd` alone: no engine, no DeepSpeed, no accelerate. The
diversity loss is a statistic of a micro-batch, of all ranks together; so with it r is taken with the same
accumulation, and without it (its weight set to 0) one r serves every split. Dropout and Gumbel noise are off. In the
ten updates that follow LayerDrop leaves out one layer or the other.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from trainer.ending import leave

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))  # this checkout before any installed copy
ACCUMULATIONS = (1, 2, 4)
RANKS = (1, 2)
PRECISIONS = ("fp32", "bf16")
_OFFLOAD = {"device": "cpu"}
ENGINES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "zero2": {"stage": 2, "overlap_comm": False},
    "zero3": {"stage": 3, "overlap_comm": False},
    "zero2_offload": {"stage": 2, "overlap_comm": False, "offload_optimizer": _OFFLOAD},
    "zero3_offload": {"stage": 3, "overlap_comm": False, "offload_optimizer": _OFFLOAD, "offload_param": _OFFLOAD},
}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
NUM_UTTERANCES = 8
NUM_UPDATES = 10
DIVERSITY_WEIGHT = 0.1


class Case(NamedTuple):
    """One row of the table."""

    precision: str
    engine: str
    ranks: int
    accumulation: int

    @property
    def file_name(self) -> str:
        return "-".join(map(str, self)) + ".pt"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one case is compared by; gradients and parameters are flat fp32 vectors."""

    gradient: Tensor  # without the diversity loss
    gradient_with_diversity: Tensor
    reported_norm: float  # of the latter
    parameters: Tensor  # after NUM_UPDATES updates without the diversity loss
    learning_rates: tuple[float, ...]


# ---------------------------------------------------------------------------------------------- in the ranks


def _config() -> Any:
    from transformers import Wav2Vec2Config

    from trainer.model.sizes import SIZES

    small = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
        "num_codevectors_per_group": 32, "codevector_dim": 16, "proj_codevector_dim": 12, "num_negatives": 20,
        "diversity_loss_weight": DIVERSITY_WEIGHT,
    }  # fmt: skip
    return Wav2Vec2Config(**{**SIZES["large"], **small})


def _micro_batch(update: int, first: int, count: int) -> Any:
    """Utterances `first` to `first + count` of the window of an update."""
    import numpy as np

    from trainer.data.collate import MaskSettings, collate
    from trainer.data.frames import FrameGeometry

    config = _config()
    utterances = range(first, first + count)
    waveforms = [np.random.default_rng([update, u]).standard_normal(16_000).astype(np.float32) for u in utterances]
    geometry = FrameGeometry(tuple(config.conv_kernel), tuple(config.conv_stride))
    masks = MaskSettings(config.mask_time_prob, config.mask_time_length, config.num_negatives)
    return collate(waveforms, utterances, update, 0, geometry, masks)


def window(update: int, accumulation: int, rank: int, ranks: int) -> list[Any]:
    """The micro-batches of one rank: the same eight utterances, whatever the split."""
    size = NUM_UTTERANCES // (accumulation * ranks)
    return [_micro_batch(update, (number * ranks + rank) * size, size) for number in range(accumulation)]


def _model() -> Any:
    from trainer.model.pretraining import build_model

    return build_model(_config(), seed=1, feature_penalty_weight=1.0, feature_grad_mult=0.5)


def _without_noise(logits: Tensor, tau: float = 1.0, hard: bool = False) -> Tensor:
    """In place of `gumbel_softmax`: the straight-through softmax without noise."""
    soft = (logits / tau).softmax(-1)
    one_hot = torch.nn.functional.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return one_hot + (soft - soft.detach()) if hard else soft


@functools.cache
def reference(precision: str, deepspeed: bool, accumulation: int, diversity_weight: float) -> Tensor:
    """The gradient of the window by `torch.autograd` alone.

    In the arithmetic of the case: for bf16 that is autocast without DeepSpeed and bf16 weights under it.
    """
    model = _model().train()
    autocast = precision == "bf16" and not deepspeed
    if precision == "bf16" and deepspeed:
        model.bfloat16()
    model.config.diversity_loss_weight = diversity_weight
    batches = window(0, accumulation, rank=0, ranks=1)
    noiseless = mock.patch.object(torch.nn.functional, "gumbel_softmax", _without_noise)
    with noiseless, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = sum(model(*batch[:5], gumbel_temperature=2.0).loss for batch in batches)
    gradients = torch.autograd.grad(
        loss / sum(batch.num_targets for batch in batches), list(model.parameters()), allow_unused=True
    )
    return _flat(gradients, list(model.parameters()))


def _flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    pairs = zip(tensors, like, strict=True)
    return torch.cat([(torch.zeros_like(p) if t is None else t).detach().float().cpu().flatten() for t, p in pairs])


def _engine(case: Case, folder: Path) -> Any:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from trainer.model.optim import build_optimizer
    from trainer.run.ds_config import resolve_ds_config
    from trainer.run.engine import build_engine

    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    zero = ENGINES[case.engine]
    ds_config = None
    if zero is not None:
        ds_config = resolve_ds_config(
            {"zero_optimization": dict(zero), "data_types": {"grad_accum_dtype": "fp32"}},
            source=case.engine,
            bf16=case.precision == "bf16",
            max_grad_norm=0.1,  # far below the norm, so that clipping is on
            gradient_accumulation_steps=case.accumulation,
            micro_batch_size=NUM_UTTERANCES // (case.accumulation * case.ranks),
            world_size=case.ranks,
        )
    model = _model()
    optimizer = build_optimizer(model, learning_rate=0.0, betas=(0.9, 0.98), epsilon=1e-6, weight_decay=0.0)
    return build_engine(
        model, optimizer, ds_config=ds_config, bf16=case.precision == "bf16", max_grad_norm=0.1, log_with=None,
        project_folder=folder,
    )  # fmt: skip


def _accumulate(engine: Any, case: Case, update: int) -> None:
    """Forward and backward of one window, as `trainer.run.loop` does it; updates after the first drop a layer."""
    from trainer.run.steps import forward

    dropped = (update % 2,) if update > 0 else ()
    batches = window(update, case.accumulation, engine.rank, case.ranks)
    agreed = engine.agree(sum(batch.num_targets for batch in batches), stop=False)
    for number, batch in enumerate(batches):
        with engine.micro_batch(last=number == len(batches) - 1):
            engine.backward(forward(engine, batch, 2.0, dropped).loss, agreed.num_targets)


def _module(engine: Any) -> Any:
    return engine.model.module if hasattr(engine.model, "module") else engine.model


def _full_gradient(engine: Any) -> Tensor:
    from deepspeed.utils import safe_get_full_grad

    parameters = list(_module(engine).parameters())
    if not engine.uses_deepspeed:
        return _flat([p.grad for p in parameters], parameters)
    return torch.cat([safe_get_full_grad(p).detach().float().cpu().flatten() for p in parameters])


def _full_parameters(engine: Any) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = list(_module(engine).parameters())
    full = [safe_get_full_fp32_param(p) if engine.uses_deepspeed else p for p in parameters]
    return torch.cat([p.detach().float().cpu().flatten() for p in full])


def _forget_moments(engine: Any) -> None:
    for state in engine.optimizer.state.values():
        for value in state.values():
            value.zero_()


def run_case(case: Case, folder: Path) -> None:
    """Every rank calls it; rank 0 writes the outcome."""
    torch.nn.functional.gumbel_softmax = _without_noise  # type: ignore[assignment]
    engine = _engine(case, folder)
    module = _module(engine)
    _accumulate(engine, case, update=0)
    with_diversity = _full_gradient(engine)
    norm = engine.step().grad_norm  # the learning rate is 0: it changes nothing
    module.config.diversity_loss_weight = 0.0
    _accumulate(engine, case, update=0)
    gradient = _full_gradient(engine)
    engine.step()
    _forget_moments(engine)  # the first of which had the diversity loss in it
    rates = []
    for update in range(1, 1 + NUM_UPDATES):
        engine.set_learning_rate(1e-3)
        _accumulate(engine, case, update)
        engine.step()
        rates.append(engine.optimizer.param_groups[0]["lr"])
    outcome = Outcome(gradient, with_diversity, norm, _full_parameters(engine), tuple(rates))
    if engine.is_main:
        torch.save(dataclasses.asdict(outcome), folder / case.file_name)


def rank_main(folder: Path, engines: Sequence[str], precisions: Sequence[str]) -> None:
    """All cases of one world size, one after the other in the same processes: a start costs more than a case."""
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    for precision, engine, accumulation in itertools.product(precisions, engines, ACCUMULATIONS):
        run_case(Case(precision, engine, ranks, accumulation), folder)


# ---------------------------------------------------------------------------------------------- outside


def run_all(folder: Path, precisions: Sequence[str] = PRECISIONS) -> dict[Case, Outcome]:
    """Start the processes and collect what they wrote."""
    for ranks in RANKS:  # plain ranks and DeepSpeed ranks join differently: processes of their own
        groups = [["plain"], [name for name in ENGINES if name != "plain"]]
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(_started(folder, ranks, engines, precisions)) for engines in groups]
            for process in started:
                if process.wait() != 0:
                    raise RuntimeError(f"a parity run on {ranks} rank(s) failed; its output is above")
    cases = itertools.product(precisions, ENGINES, RANKS, ACCUMULATIONS)
    return {case: Outcome(**torch.load(folder / case.file_name)) for case in itertools.starmap(Case, cases)}


@contextlib.contextmanager
def _started(
    folder: Path, ranks: int, engines: Sequence[str], precisions: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", __file__, "--rank_folder", str(folder),
        "--engines", *engines, "--precisions", *precisions,
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # the references are of the CPU
    }  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, cwd=REPOSITORY)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in fp64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Row(NamedTuple):
    """Relative differences of one case."""

    case: Case
    gradient: float  # without the diversity loss, against the reference for the window as one micro-batch
    gradient_with_diversity: float  # against the reference with the same accumulation
    norm: float  # the one reported against the one computed from the gradient
    parameters: float  # after ten updates, against those of the unsplit window, relative to how far these moved


def compare(outcomes: dict[Case, Outcome]) -> list[Row]:
    """Every case against its references."""
    start = torch.cat([p.detach().flatten() for p in _model().parameters()])
    rows = []
    for case, outcome in outcomes.items():
        deepspeed = case.engine != "plain"
        unsplit = Case(case.precision, "zero2" if deepspeed and case.precision == "bf16" else "plain", 1, 1)
        parameters = outcomes[unsplit].parameters
        diverse = reference(case.precision, deepspeed, case.accumulation, DIVERSITY_WEIGHT)
        rows.append(
            Row(
                case,
                relative_difference(outcome.gradient, reference(case.precision, deepspeed, 1, 0.0)),
                relative_difference(outcome.gradient_with_diversity, diverse),
                abs(outcome.reported_norm / float(outcome.gradient_with_diversity.double().norm()) - 1),
                float((outcome.parameters - parameters).norm() / (parameters - start).norm()),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| precision | engine | ranks | accumulation | gradient | with diversity loss | reported norm | ten updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {' | '.join(map(str, row.case))} | {' | '.join(f'{value:.1e}' for value in row[1:])} |" for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fp32_only", action="store_true", help="Leave bf16 out.")
    for name in ("--rank_folder", "--engines", "--precisions"):  # how it starts itself on each rank
        parser.add_argument(name, nargs="?" if name == "--rank_folder" else "*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_folder:
        rank_main(Path(options.rank_folder), options.engines, options.precisions)
        leave(0)
    with tempfile.TemporaryDirectory() as folder:
        print(table(compare(run_all(Path(folder), PRECISIONS[:1] if options.fp32_only else PRECISIONS))))


if __name__ == "__main__":
    main()
