"""The keys kept in our code are those that the installed DeepSpeed reads."""

from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.activation_checkpointing.config import DeepSpeedActivationCheckpointingConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from trainer.run.ds_schema import SECTIONS, unknown_keys

MODELS: dict[str, Any] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
}


@pytest.mark.parametrize("section", MODELS)
def test_a_section_has_the_keys_of_deepspeeds_class(section: str) -> None:
    fields = MODELS[section].model_fields
    assert SECTIONS[section] == set(fields) | {field.alias for field in fields.values() if field.alias}


def test_sections_without_a_class_have_the_keys_that_deepspeed_looks_up() -> None:
    assert SECTIONS["aio"] == set(AIO_DEFAULT_DICT)
    empty: dict[str, Any] = {}
    assert SECTIONS["activation_checkpointing"] == set(vars(DeepSpeedActivationCheckpointingConfig(empty)))
    assert SECTIONS["flops_profiler"] == set(vars(DeepSpeedFlopsProfilerConfig(empty)))


@pytest.mark.parametrize(
    ("config", "key", "hint"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation", "; did you mean zero_optimization?"),
        (
            {"zero_optimization": {"ofload_param": {}}},
            "zero_optimization.ofload_param",
            "; did you mean offload_param?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"buffer_cout": 4}}},
            "zero_optimization.offload_optimizer.buffer_cout",
            "; did you mean buffer_count?",
        ),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype", "; did you mean grad_accum_dtype?"),
        (
            {"zero_optimization": {"gradient_clipping": 1.0}},
            "zero_optimization.gradient_clipping",
            " there; move it to the top level.",
        ),
        ({"overlap_comm": False}, "overlap_comm", " there; move it to zero_optimization."),
        ({"aio": {"xyzzy": 1}}, "aio.xyzzy", "; remove it."),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_at_any_level(config: dict[str, Any], key: str, hint: str) -> None:
    assert list(unknown_keys(config, frozenset())) == [f"{key} is not a key that DeepSpeed reads{hint}"]


def test_keys_told_of_elsewhere_and_sections_of_another_type_are_left_alone() -> None:
    assert not list(unknown_keys({"amp": {}, "bf16": True, "zero_optimization": [2]}, frozenset({"amp"})))
