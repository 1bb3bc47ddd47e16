"""Started by `test_train_in_part.py` on two CPU ranks: models of which a part is frozen or unused, in every engine.

For each of `CASES` two updates; rank 0 writes the weights and the last loss to ROOT/<name>.pt. Plain ranks and
DeepSpeed ranks join differently, so each of them is started on its own: train_in_part.py ROOT plain|deepspeed
"""

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.ending import leave

ENGINES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    # nothing is kept between uses, however small: otherwise these models would never be cut
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1},
}
FAMILIES = ("wav2vec2", "conformer")


class Case(NamedTuple):
    engine: str
    family: str
    frozen: bool
    checkpointed: bool
    bf16: bool = False

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


CASES = [Case(*values) for values in itertools.product(ENGINES, FAMILIES, (False, True), (False, True))]
CASES += [Case(*values) for values in itertools.product(ENGINES, FAMILIES, (True,), (True,), (True,))]


def fresh_model(family: str) -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ConformerConfig

    from trainer.model.pretraining import build_model
    from trainer.model.sizes import SIZES

    small: dict[str, Any] = {
        **SIZES["demo"], "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "conv_dim": (16,) * 7,
    }  # fmt: skip
    if family == "wav2vec2":
        return build_model(Wav2Vec2Config(**small), seed=1)
    return build_model(Wav2Vec2ConformerConfig(**small, conv_depthwise_kernel_size=5), seed=1)


def _engine(case: Case, folder: Path) -> Any:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from trainer.model.optim import build_optimizer
    from trainer.run.ds_config import resolve_ds_config
    from trainer.run.engine import build_engine

    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    zero, ds_config = ENGINES[case.engine], None
    if zero is not None:
        ds_config = resolve_ds_config(
            {"zero_optimization": dict(zero)}, source=case.engine, bf16=case.bf16, max_grad_norm=1.0,
            gradient_accumulation_steps=1, micro_batch_size=2, world_size=2,
        )  # fmt: skip
    model = fresh_model(case.family)
    if case.frozen:
        model.freeze_feature_encoder()
    if case.checkpointed:
        model.checkpoint_activations()
    optimizer = build_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.98), epsilon=1e-6, weight_decay=0.01)
    return build_engine(
        model, optimizer, ds_config=ds_config, bf16=case.bf16, max_grad_norm=1.0, log_with=None, project_folder=folder
    )


def _batch(update: int, rank: int) -> Any:
    import numpy as np

    from trainer.data.collate import MaskSettings, collate
    from trainer.data.frames import WAV2VEC2_GEOMETRY

    utterances = [2 * rank, 2 * rank + 1]
    waveforms = [np.random.default_rng([update, u]).standard_normal(8_000).astype(np.float32) for u in utterances]
    return collate(waveforms, utterances, update, 0, WAV2VEC2_GEOMETRY, MaskSettings(0.5, 5, 20))


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    """The whole weights that a forward pass takes, on every rank."""
    from deepspeed.runtime.zero import GatheredParameters

    module = engine.model.module
    weights = {}
    for name, parameter in module.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
    return weights


def run_case(case: Case, folder: Path) -> None:
    from trainer.run.steps import forward, seed_micro_batch

    engine = _engine(case, folder)
    loss = 0.0
    for update in range(2):
        batch = _batch(update, engine.rank)
        agreed = engine.agree(batch.num_targets, stop=False)
        seed_micro_batch(0, update, engine.rank)
        with engine.micro_batch(last=True):
            terms = forward(engine, batch, 2.0)
            engine.backward(terms.loss, agreed.num_targets)
        loss = engine.sum_over_ranks(terms.contrastive_loss).item() / agreed.num_targets
        engine.step()
    weights = _weights(engine)
    if engine.is_main:
        torch.save({"weights": weights, "loss": loss}, folder / f"{case.name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in CASES:
        if (each.engine == "plain") == (sys.argv[2] == "plain"):
            run_case(each, Path(sys.argv[1]))
    leave(0)
