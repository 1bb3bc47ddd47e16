"""Reading DeepSpeed configurations, filling in the trainer's values, refusing what disagrees."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.arguments import parse_arguments, shipped_recipes
from trainer.run import ds_config
from trainer.run.ds_config import (
    DsConfigError,
    ds_config_of,
    load_ds_config,
    partitioning,
    resolve_ds_config,
    shipped_configs,
)
from trainer.run.ds_schema import SECTIONS
from trainer.run.engine import check_zero_section

RUN: dict[str, Any] = {
    "source": "my.json",
    "bf16": True,
    "max_grad_norm": 1.0,
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 8,
    "world_size": 2,
}


def resolve(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return resolve_ds_config({"zero_optimization": {"stage": 2}, **config}, **{**RUN, **changes})


def problems(config: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(DsConfigError) as error:
        resolve(config, **changes)
    headline, *lines = str(error.value).split("\n  - ")
    assert headline.startswith("my.json does not fit this run (")
    return lines


# --- load_ds_config


def test_every_stage_is_shipped() -> None:
    assert list(shipped_configs()) == ["zero2", "zero2_offload", "zero3", "zero3_nvme", "zero3_offload"]


@pytest.mark.parametrize("name", sorted(shipped_configs()))
@pytest.mark.parametrize("recipe", shipped_recipes())
def test_every_shipped_config_fits_every_shipped_recipe(name: str, recipe: str, tmp_path: Path) -> None:
    flags = [f"--config={recipe}", f"--deepspeed={name}", "--dataset_name=speech", "--output_dir=run"]
    if name == "zero3_nvme":
        flags.append(f"--nvme_path={tmp_path}")
    arguments = parse_arguments(flags)
    resolved = ds_config_of(arguments, world_size=8)
    assert resolved is not None and "auto" not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 8 * arguments.per_device_train_batch_size
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    zero = resolved["zero_optimization"]
    assert f"zero{zero['stage']}" == name[:5]
    assert zero["stage"] == 3 or zero["overlap_comm"] is False
    check_zero_section(resolved)  # as DeepSpeed reads it


def test_the_folder_on_nvme_is_the_runs_own(tmp_path: Path) -> None:
    flags = ["--config=demo", "--dataset_name=speech", "--deepspeed=zero3_nvme", f"--nvme_path={tmp_path}"]
    folders = set()
    for output_dir in ("a", "b"):
        resolved = ds_config_of(parse_arguments([*flags, f"--output_dir={output_dir}"]), world_size=1)
        assert resolved is not None
        folders.add(Path(resolved["zero_optimization"]["offload_optimizer"]["nvme_path"]))
    assert len(folders) == 2 and {folder.parent for folder in folders} == {tmp_path}


def test_a_path_is_read_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path)
    assert load_ds_config("ds_configs/zero2.json") == {"zero_optimization": {"stage": 1}}


def test_an_installed_wheel_has_the_configs_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.json").write_text("{}")
    monkeypatch.setattr(ds_config, "SHIPPED_FOLDERS", (tmp_path / "absent", tmp_path))
    assert load_ds_config("mine") == {}


def test_a_missing_file_lists_the_shipped_names() -> None:
    with pytest.raises(DsConfigError, match=r"--deepspeed \(zero9\) .*No such file.*shipped names: .*zero2"):
        load_ds_config("zero9")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DsConfigError, match="Is a directory"):
        load_ds_config(str(tmp_path))


def test_a_syntax_error_has_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text('{\n  "bf16": {"enabled" true}\n}')
    with pytest.raises(DsConfigError, match=r"my\.json, line 2, column 22: not JSON"):
        load_ds_config(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "one JSON object"),
        (b'{"bf16": {}, "bf16": {}}', 'the key "bf16" occurs twice'),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "my.json"
    path.write_bytes(content)
    with pytest.raises(DsConfigError, match=message):
        load_ds_config(str(path))


def test_reading_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, trainer.run.ds_config; sys.exit(bool({'torch', 'deepspeed', 'accelerate'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- resolve_ds_config: values written


@pytest.mark.parametrize("auto", [{}, {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}}])
def test_auto_and_absent_are_filled(auto: dict[str, Any]) -> None:
    assert resolve(auto) == {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": 8,
        "train_batch_size": 64,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_the_file_may_ask_for_the_compiled_cpu_optimizer() -> None:
    assert resolve({"zero_force_ds_cpu_optimizer": True})["zero_force_ds_cpu_optimizer"] is True


def test_no_clipping_is_zero() -> None:
    clipping = resolve({}, max_grad_norm=0)["gradient_clipping"]
    assert isinstance(clipping, float)
    assert clipping == 0.0


def test_an_equal_value_is_accepted() -> None:
    same = {"gradient_clipping": 1, "train_batch_size": 64, "bf16": {"enabled": True}, "fp16": {"enabled": False}}
    assert resolve(same)["train_batch_size"] == 64


def test_what_the_file_owns_stays() -> None:
    own = {"bf16": {"check_grad_overflow": False}, "data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 7}
    resolved = resolve(own)
    assert resolved["bf16"] == {"check_grad_overflow": False, "enabled": True}
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["steps_per_print"] == 7


# --- resolve_ds_config: values refused


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            {"gradient_clipping": 0.5},
            {},
            "gradient_clipping is 0.5, but --max_grad_norm sets it to 1.0; "
            'write "auto" in the file or pass --max_grad_norm 0.5.',
        ),
        (
            {"gradient_accumulation_steps": 2},
            {},
            "gradient_accumulation_steps is 2, but --gradient_accumulation_steps sets it to 4; "
            'write "auto" in the file or pass --gradient_accumulation_steps 2.',
        ),
        (
            {"train_micro_batch_size_per_gpu": 16},
            {},
            "train_micro_batch_size_per_gpu is 16, but --per_device_train_batch_size sets it to 8; "
            'write "auto" in the file or pass --per_device_train_batch_size 16.',
        ),
        (
            {"train_batch_size": 32},
            {},
            "train_batch_size is 32, but --per_device_train_batch_size (8) x --gradient_accumulation_steps (4) x "
            'ranks (2) sets it to 64; write "auto" in the file.',
        ),
        (
            {"bf16": {"enabled": False}},
            {},
            'bf16.enabled is false, but --bf16 sets it to true; write "auto" in the file or leave out --bf16.',
        ),
        (
            {"bf16": {"enabled": True}},
            {"bf16": False},
            'bf16.enabled is true, but --bf16 sets it to false; write "auto" in the file or pass --bf16.',
        ),
        (
            {"fp16": {"enabled": True}},
            {},
            "fp16.enabled is true, but this trainer, which knows fp32 and bf16 (--bf16) only, sets it to false; "
            'write "auto" in the file.',
        ),
        (
            {"gradient_allreduce_op": "sum"},
            {},
            'gradient_allreduce_op is "sum", but the loop sets it to "mean"; write "auto" in the file.',
        ),
        (
            {"managed_gradient_accumulation": False},
            {},
            'managed_gradient_accumulation is false, but the loop sets it to true; write "auto" in the file.',
        ),
        ({"bf16": True}, {}, 'bf16 is true; it must be an object such as {"enabled": "auto"}, or be removed.'),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            {},
            "optimizer is set, but --learning_rate, --weight_decay, --adam_beta1, --adam_beta2 and --adam_epsilon "
            "set the optimizer; remove it.",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {},
            "scheduler is set, but --learning_rate, --num_warmup_steps and --max_train_steps set the schedule; "
            "remove it.",
        ),
        ({"amp": {"enabled": False}}, {}, "amp is set, but --bf16 sets the precision; remove it."),
        ({"bfloat16": {"enabled": True}}, {}, 'bfloat16 is set, but it is the old name of "bf16"; remove it.'),
        (
            {"gradient_cliping": 1.0},
            {},
            "gradient_cliping is not a key that DeepSpeed reads; did you mean gradient_clipping?",
        ),
        (
            {"data_types": "fp32"},
            {},
            'data_types is "fp32"; it must be an object such as {"buffer_dtype": ...}, or be removed.',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            {},
            'zero_optimization.offload_optimizer is "cpu"; it must be an object such as {"device": ...}, '
            "or be removed.",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": None}},
            {},
            'zero_optimization.offload_param is null; it must be an object such as {"device": ...}, or be removed.',
        ),
        (
            {"data_types": {"grad_accum_dtype": "float99"}},
            {},
            'data_types.grad_accum_dtype ("float99") must be "fp32", "bf16" or "fp16"; write one of them or remove it.',
        ),
        (
            {"communication_data_type": "float32"},
            {},
            'communication_data_type ("float32") must be "fp32", "bf16" or "fp16"; write one of them or remove it.',
        ),
        ({"xyzzy": 1}, {}, "xyzzy is not a key that DeepSpeed reads; remove it."),
        (
            {"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}},
            {},
            'zero_optimization.allgather_bucket_size is "auto", which nothing fills in; write a value or remove it.',
        ),
        (
            {"aio": {"block_size": ["auto"]}},
            {},
            'aio.block_size[0] is "auto", which nothing fills in; write a value or remove it.',
        ),
    ],
)
def test_a_value_the_file_does_not_own_is_refuse(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    assert problems(config, **changes) == [message]


@pytest.mark.parametrize(
    "zero", [{"stage": 0}, {"stage": 4}, {"stage": -1}, {"stage": "auto"}, {"stage": True}, {"stage": "2"}, {}]
)
def test_a_stage_is_1_to_3(zero: dict[str, Any]) -> None:
    (problem,) = problems({"zero_optimization": zero})
    assert problem.startswith("zero_optimization.stage (")
    assert ") must be 1, 2 or 3; write one of them" in problem


@pytest.mark.parametrize("zero", [True, None, [2]])
def test_zero_optimization_is_an_object(zero: object) -> None:
    assert problems({"zero_optimization": zero}) == [
        "zero_optimization.stage (not set) must be 1, 2 or 3; write one of them, or leave --deepspeed out to train "
        "without ZeRO."
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_is_accepted(stage: int) -> None:
    assert resolve({"zero_optimization": {"stage": stage}})["zero_optimization"]["stage"] == stage


def test_other_names_of_a_type_are_accepted() -> None:
    assert resolve({"data_types": {"grad_accum_dtype": "float32"}})["data_types"] == {"grad_accum_dtype": "float32"}


def test_what_is_filled_in_later_may_be_auto() -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    assert resolve({"zero_optimization": zero})["zero_optimization"] == zero


def test_all_problems_are_reported_together() -> None:
    found = problems({"gradient_clipping": 2.0, "optimizer": {}, "typo": 1, "zero_optimization": {"stage": 7}})
    assert [line.split()[0] for line in found] == ["typo", "optimizer", "zero_optimization.stage", "gradient_clipping"]


# --- properties

_keys = st.sampled_from(["enabled", "stage", "params", "x"])
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just("auto") | st.text(max_size=5),
    lambda inner: st.dictionaries(_keys, inner) | st.lists(inner, max_size=3),
    max_leaves=6,
)
_configs = st.dictionaries(
    st.sampled_from(sorted(SECTIONS[""] | set(ds_config.REFUSED_KEYS))) | st.text(max_size=8),
    _values,
    max_size=8,
)


@given(_configs)
def test_resolving_never_changes_its_input_and_fails_only_with_a_message(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    try:
        resolve_ds_config(config, **RUN)
    except DsConfigError as error:
        assert "my.json" in str(error)
    assert config == before


@given(
    st.fixed_dictionaries(
        {
            "source": st.just("my.json"),
            "bf16": st.booleans(),
            "max_grad_norm": st.floats(0, 10),
            "gradient_accumulation_steps": st.integers(1, 64),
            "micro_batch_size": st.integers(1, 64),
            "world_size": st.integers(1, 64),
        }
    )
)
def test_a_resolved_config_resolves_to_itself(run: dict[str, Any]) -> None:
    resolved = resolve_ds_config(load_ds_config("zero2"), **run)
    assert resolve_ds_config(resolved, **run) == resolved


def _partitioning(**zero: Any) -> dict[str, Any]:
    return partitioning(resolve({"zero_optimization": {"stage": 2, **zero}}))


def test_partitioning_tells_apart_what_cuts_state_otherwise() -> None:
    assert _partitioning() == _partitioning(overlap_comm=False, reduce_bucket_size=5)
    different = [
        _partitioning(),
        _partitioning(stage=3),
        _partitioning(offload_optimizer={"device": "cpu"}),
        _partitioning(offload_param={"device": "cpu"}),
        _partitioning(parameter_alignment=True),
        _partitioning(sub_group_size=500),
    ]
    assert all(left != right for number, left in enumerate(different) for right in different[:number])
    assert _partitioning() == _partitioning(offload_optimizer={"device": "none"})
    assert json.loads(json.dumps(_partitioning())) == _partitioning()  # as it comes back from a checkpoint
