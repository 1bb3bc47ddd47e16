"""Flags, recipes and the rules between them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer.arguments import (
    FIELDS,
    ArgumentsError,
    HelpRequested,
    dump_recipe,
    parse_arguments,
    shipped_recipes,
    value_type,
)

REPOSITORY = Path(__file__).parents[2]
NEEDED = ["--dataset_name=speech", "--output_dir=run", "--model_name_or_path=demo"]

# run_wav2vec2_pretraining_no_trainer.py's flags that make sense for a folder of audio, with their defaults there.
STOCK_DEFAULTS = {
    "validation_split_percentage": 1,
    "logging_steps": 500,
    "saving_steps": 500,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "num_train_epochs": 3,
    "max_train_steps": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "linear",
    "num_warmup_steps": 0,
    "seed": 0,
    "max_gumbel_temperature": 2.0,
    "min_gumbel_temperature": 0.5,
    "gumbel_temperature_decay": 0.999995,
    "max_duration_in_seconds": 5.0,
    "min_duration_in_seconds": 3.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "preprocessing_only": False,
    "overwrite_cache": False,
    "cache_dir": None,
    "config_name": None,
}


def test_stock_flags_keep_name_and_default() -> None:
    arguments = parse_arguments(NEEDED)
    assert {name: getattr(arguments, name) for name in STOCK_DEFAULTS} == STOCK_DEFAULTS


def test_the_stock_command_line_is_understood() -> None:
    arguments = parse_arguments(
        [*NEEDED, "--max_train_steps=20000", "--num_warmup_steps", "2000", "--learning_rate=1e-3",
         "--gradient_checkpointing", "--adam_epsilon", "1e-06"]
    )  # fmt: skip
    assert arguments.max_train_steps == 20_000 and arguments.learning_rate == 1e-3
    assert arguments.gradient_checkpointing and arguments.adam_epsilon == 1e-6


@pytest.mark.parametrize("recipe", ["demo", "base", "large", "conformer_large", "xlsr_1b", "xlsr_2b"])
def test_shipped_recipes_parse(recipe: str) -> None:
    assert recipe in shipped_recipes()
    arguments = parse_arguments([f"--config={recipe}", "--dataset_name=speech", "--output_dir=run"])
    assert arguments.model_name_or_path == recipe


def test_large_has_the_published_schedule() -> None:
    arguments = parse_arguments(["--config=large", "--dataset_name=speech", "--output_dir=run"])
    assert (arguments.learning_rate, arguments.num_warmup_steps, arguments.max_train_steps) == (3e-4, 20_000, 250_000)
    assert (arguments.max_gumbel_temperature, arguments.min_gumbel_temperature) == (2.0, 0.1)


def test_the_conformer_has_the_schedule_of_its_published_file() -> None:
    arguments = parse_arguments(["--config=conformer_large", "--dataset_name=speech", "--output_dir=run"])
    assert (arguments.learning_rate, arguments.num_warmup_steps) == (5e-3, 32_000)
    assert arguments.max_train_steps == 1_000_000


def test_a_start_from_other_weights_brings_its_own_configuration() -> None:
    arguments = parse_arguments(["--dataset_name=speech", "--output_dir=run", "--init_from=owner/name"])
    assert arguments.model_name_or_path is None and not arguments.allow_missing_head
    assert parse_arguments([*NEEDED, "--init_from=x", "--allow_missing_head"]).allow_missing_head


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rate: 3e-4\nseed: 7\nbf16: true\n")
    arguments = parse_arguments([*NEEDED, f"--config={recipe}", "--seed=9", "--bf16=false"])
    assert arguments.learning_rate == 3e-4  # YAML reads 3e-4 as text
    assert arguments.seed == 9 and arguments.bf16 is False


def test_the_resolved_recipe_can_be_passed_back(tmp_path: Path) -> None:
    first = parse_arguments(["--config=large", "--dataset_name=speech", "--output_dir=run", "--seed=3"])
    (tmp_path / "config.yaml").write_text(dump_recipe(first))
    again = parse_arguments([f"--config={tmp_path / 'config.yaml'}"])
    assert dataclasses.replace(again, config=None) == dataclasses.replace(first, config=None)


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("learning_rat: 1.0\nseed: many\n")
    with pytest.raises(ArgumentsError) as caught:
        parse_arguments(
            [f"--config={recipe}", "--max_duration_in_seconds=1", "--min_duration_in_seconds=2", "--logging_steps=0",
             "--lerning_rate=1", "--report_to=none"]
        )  # fmt: skip
    message = str(caught.value)
    for part in (
        "unknown flag --lerning_rate; did you mean --learning_rate?",
        "unknown key 'learning_rat' in recipe",
        "seed ('many')",
        "max_duration_in_seconds (1.0) must be at least min_duration_in_seconds (2.0)",
        "logging_steps (0) must be greater than 0",
        "dataset_name is not set",
        "output_dir is not set",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--config=nosuch"], "nosuch"),
        (["--max_train_steps=ten"], "max_train_steps"),
        (["--report_to=mlflow"], "report_to"),
        (["speech"], "unexpected argument 'speech'"),
        (
            ["--apples", "3", "--pears=4", "speech"],
            r"flag --apples; see .*\n.*flag --pears; .*\nunexpected argument 'speech'",
        ),
        (["--max_batch_seconds=2"], "max_batch_seconds"),
        (["--max_gumbel_temperature=0.1"], "max_gumbel_temperature"),
        (["--max_train_steps=10", "--num_warmup_steps=11"], "num_warmup_steps"),
        (["--bf16=perhaps"], "bf16"),
        (["--adam_beta2=1.0"], "adam_beta2"),
        (["--output_dir="], "output_dir is empty"),
        (["--init_from="], "init_from is empty"),
        (["--allow_missing_head"], "allow_missing_head .* give --init_from or leave"),
    ],
)
def test_mistakes_are_named(flags: list[str], part: str) -> None:
    with pytest.raises(ArgumentsError, match=part):
        parse_arguments([*NEEDED, *flags])


def test_a_recipe_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text("a: [1,\n")
    with pytest.raises(ArgumentsError, match=r"broken\.yaml"):
        parse_arguments([*NEEDED, f"--config={recipe}"])


def test_help_names_every_flag() -> None:
    with pytest.raises(HelpRequested) as caught:
        parse_arguments(["--help"])
    assert all(f"--{name}" in str(caught.value) for name in FIELDS)


@given(seed=st.integers(0, 2**31), rate=st.floats(1e-9, 1.0), bf16=st.booleans())
def test_values_survive_the_way_through_yaml(seed: int, rate: float, bf16: bool) -> None:
    arguments = parse_arguments([*NEEDED, f"--seed={seed}", f"--learning_rate={rate!r}", f"--bf16={bf16}"])
    loaded = yaml.safe_load(dump_recipe(arguments))
    assert (loaded["seed"], loaded["learning_rate"], loaded["bf16"]) == (seed, rate, bf16)


def test_optional_flags_have_plain_types() -> None:
    assert value_type("max_train_steps") is int and value_type("max_batch_seconds") is float


@pytest.mark.parametrize("command", [["--help"], ["pretrain", "--help"], ["convert", "--help"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from trainer.cli import main\n"
        f"try: main({command})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: trainer" in result.stdout


def test_padding_needs_batches_that_are_not_cropped() -> None:
    with pytest.raises(ArgumentsError, match=r"^pad_to_multiple_of \(8\) needs no_crop: .* add --no_crop or leave"):
        parse_arguments([*NEEDED, "--pad_to_multiple_of=8"])
    assert parse_arguments([*NEEDED, "--pad_to_multiple_of=8", "--no_crop"]).pad_to_multiple_of == 8
    with pytest.raises(ArgumentsError, match=r"^pad_to_multiple_of \(700000\) must be at most .* \(40 s of 16,000"):
        parse_arguments([*NEEDED, "--pad_to_multiple_of=700000", "--no_crop"])
