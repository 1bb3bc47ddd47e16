"""Started by `test_elastic_resume.py`: checkpoints of every engine are loaded into every other one and compared.

    reshard.py ROOT SOURCE ... SOURCE:TARGET ...

A SOURCE is trained for two updates and saved; SOURCE:TARGET is loaded and compared, bit by bit. The number of ranks is
the launcher's. Plain ranks and DeepSpeed ranks join differently, so each is started on its own.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.integration.train_in_part import _batch, fresh_model
from trainer.ending import leave

NUM_UPDATES = 2
CPU = {"device": "cpu"}


class Setting(NamedTuple):
    zero: dict[str, Any] | None = None
    bf16: bool = False

    @property
    def engine(self) -> str:
        return "plain" if self.zero is None else "deepspeed"


TARGETS = {
    "plain": Setting(),
    "zero1-bf16": Setting({"stage": 1}, bf16=True),  # DeepSpeed's BF16_Optimizer
    "zero2": Setting({"stage": 2}),
    "zero2-offload-bf16": Setting({"stage": 2, "offload_optimizer": CPU, "parameter_alignment": True}, bf16=True),
    # one that keeps small parameters whole, and one that cuts all of them, in many groups
    "zero3-bf16": Setting({"stage": 3}, bf16=True),
    "zero3-offload": Setting(
        {
            "stage": 3, "offload_optimizer": CPU, "offload_param": CPU, "stage3_param_persistence_threshold": 0,
            "sub_group_size": 500,
        }
    ),
}  # fmt: skip
SOURCES = {
    "plain": ("conformer", False),
    "zero1-bf16": ("wav2vec2", True),
    "zero2": ("conformer", True),
    "zero3-offload": ("wav2vec2", True),
    "zero3-bf16": ("conformer", False),
}
"""Which family is saved, and whether its front end is frozen."""


def _engine(setting: Setting, family: str, frozen: bool, folder: Path) -> Any:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from trainer.model.optim import build_optimizer
    from trainer.run.ds_config import resolve_ds_config
    from trainer.run.engine import build_engine, launched_ranks

    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    ds_config = None
    if setting.zero is not None:
        ds_config = resolve_ds_config(
            {"zero_optimization": dict(setting.zero), "data_types": {"grad_accum_dtype": "fp32"}}, source="test",
            bf16=setting.bf16, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=2,
            world_size=launched_ranks(),
        )  # fmt: skip
    model = fresh_model(family)
    if frozen:
        model.freeze_feature_encoder()
    optimizer = build_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.98), epsilon=1e-6, weight_decay=0.01)
    return build_engine(
        model, optimizer, ds_config=ds_config, bf16=setting.bf16, max_grad_norm=1.0, log_with=None,
        project_folder=folder,
    )  # fmt: skip


def _update(engine: Any, number: int) -> None:
    from trainer.run.steps import forward, seed_micro_batch

    batch = _batch(number, engine.rank)
    agreed = engine.agree(batch.num_targets, stop=False)
    seed_micro_batch(0, number, engine.rank)
    with engine.micro_batch(last=True):
        engine.backward(forward(engine, batch, 2.0).loss, agreed.num_targets)
    assert not engine.step().skipped


def save(name: str, root: Path) -> None:
    family, frozen = SOURCES[name]
    engine = _engine(TARGETS[name], family, frozen, root)
    for number in range(NUM_UPDATES):
        _update(engine, number)
    engine.average_batch_norms()
    folder = root / name
    if engine.is_main:
        folder.mkdir()
        (folder / "world_size").write_text(str(engine.world_size))
    engine.barrier()
    engine.save(folder)
    engine.barrier()
    saved = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors"))
    # names, padding and zip records are much beside such small weights; `large` has the rule of a few per mille
    assert engine.checkpoint_bytes <= saved <= 1.2 * engine.checkpoint_bytes + 200_000 * engine.world_size, name


def load(name: str, target: str, root: Path) -> None:
    """The weights a forward pass takes, the fp32 ones behind them, buffers, moments and step are those that were saved.

    Only what was saved in bf16 (frozen weights, buffers) or is now kept in it is rounded.
    """
    from trainer.convert.training_state import read_training_state

    family, frozen = SOURCES[name]
    folder, saved = root / name, TARGETS[name].engine
    world_size = int((folder / "world_size").read_text())
    engine = _engine(TARGETS[target], family, frozen, root)
    engine.load_resharded(folder, engine=saved, world_size=world_size, num_updates=2, num_skipped_updates=0)
    source = read_training_state(folder, engine=saved, world_size=world_size)
    module = engine.model.module if engine.uses_deepspeed else engine.accelerator.unwrap_model(engine.model)
    parameters = dict(module.named_parameters())
    for weight in source.weights:
        found = module.state_dict()[weight.name]
        if weight.name in parameters:
            found = _whole(parameters[weight.name])
        assert torch.equal(found, weight.read().to(found.dtype)), weight.name
    adam = engine.model.optimizer.optimizer if engine.uses_deepspeed else engine.optimizer.optimizer
    for key, moments in source.moments.of.items():
        assert set(moments) == {n for n, p in parameters.items() if p.requires_grad}
        for parameter_name, moment in moments.items():
            master, state = _masters(parameters[parameter_name], key, adam)
            assert torch.equal(state, moment.read()), (key, parameter_name)
            weight = next(weight for weight in source.weights if weight.name == parameter_name)
            assert torch.equal(master, weight.read()), parameter_name
    assert {float(state["step"]) for state in adam.state.values()} == {NUM_UPDATES}
    _update(engine, NUM_UPDATES)
    assert max(float(state["step"]) for state in adam.state.values()) == NUM_UPDATES + 1


def _whole(parameter: Any) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()  # type: ignore[no-any-return]
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()  # type: ignore[no-any-return]


def _masters(parameter: Any, key: str, adam: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return parameter.detach(), adam.state[parameter][key]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_fp32_param(parameter).detach(), safe_get_full_optimizer_state(parameter, key).detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for word in sys.argv[2:]:
        saved_name, _, target_name = word.partition(":")
        if target_name:
            load(saved_name, target_name, Path(sys.argv[1]))
        else:
            save(saved_name, Path(sys.argv[1]))
    leave(0)
