"""`trainer plan`: what it refuses, recommends and prints."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from trainer.arguments import parse_arguments
from trainer.cli import main
from trainer.memory.fit import Need, usable_bytes
from trainer.model.sizes import shipped_config
from trainer.plan import build_parser, command, recommend, resolve

SMALL = ("--model=demo", "--gpu_memory=4GB")


def _resolve(*flags: str) -> Any:
    return resolve(build_parser().parse_args([*SMALL, *flags]))


def _complaint(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["plan", *SMALL, *flags]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "Traceback" not in output.err
    return output.err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9), ("24gb", 24 * 10**9), ("24 GiB", 24 * 2**30), ("24000MB", 24 * 10**9),
        ("25769803776", 24 * 2**30), ("0.5TiB", 2**39), ("24000000000B", 24 * 10**9),
    ],
)  # fmt: skip
def test_memory_is_read(text: str, size: int) -> None:
    assert _resolve("--gpu_memory", text).gpu_memory == size
    assert _resolve("--cpu_memory", text).cpu_memory == size


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--gpu_memory=24kB", "gpu_memory (24kB) has an unknown unit; did you mean 24GB?"),
        ("--gpu_memory=24G", "gpu_memory (24G) has an unknown unit; did you mean 24GB?"),
        ("--gpu_memory=24GIG", "did you mean 24GiB?"),
        ("--gpu_memory=24", "gpu_memory (24) is 24 bytes, in which nothing fits; did you mean 24GB?"),
        ("--gpu_memory=much", "gpu_memory (much) must be a number and a unit, such as 24GB"),
        ("--gpu_memory=-24GB", "gpu_memory (-24GB) must be a number and a unit"),
        ("--gpu_memory=0GB", "gpu_memory (0GB) is 0 bytes, in which nothing fits"),
        ("--cpu_memory=64GX", "cpu_memory (64GX) has an unknown unit; did you mean 64GB?"),
        ("--num_gpus=0", "num_gpus (0) must be at least 1"),
        ("--num_gpus=two", "argument --num_gpus: invalid int value: 'two'"),
        ("--batch_seconds=0", "batch_seconds (0) must be at least 0.1"),
        ("--batch_seconds=nan", "batch_seconds (nan) must be at least 0.1"),
        ("--max_duration_in_seconds=-1", "max_duration_in_seconds (-1) must be at least 0.1"),
        ("--model=lage", "model (lage) is no shipped size; did you mean large?"),
        ("--model=/no/such/folder", "model (/no/such/folder) does not exist"),
        ("--gpu_memroy=24GB", "unrecognized arguments: --gpu_memroy=24GB"),
    ],
)
def test_mistakes(flag: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _complaint(capsys, flag)


def test_all_mistakes_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    complaint = _complaint(capsys, "--num_gpus=0", "--gpu_memory=24G", "--batch_seconds=0")
    assert all(name in complaint for name in ("num_gpus (0)", "gpu_memory (24G)", "batch_seconds (0)"))


def test_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "--model, --gpu_memory" in capsys.readouterr().err


def test_the_recipe_of_the_model_says_what_no_flag_says() -> None:
    request = resolve(build_parser().parse_args(["--model=large", "--gpu_memory=24GB"]))
    assert (request.batch_seconds, request.utterance_seconds) == (75.0, 20.0)
    request = resolve(build_parser().parse_args(["--model=large", "--gpu_memory=24GB", "--batch_seconds=10"]))
    assert (request.batch_seconds, request.utterance_seconds) == (10.0, 10.0)  # crops are no longer than a batch
    request = resolve(build_parser().parse_args(["--model=some/folder", "--gpu_memory=24GB"]))
    assert (request.batch_seconds, request.utterance_seconds) == (75.0, 20.0)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the demo's architecture from a local folder, as JSON."""
    folder = tmp_path_factory.mktemp("model")
    shipped_config("demo").save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        words = ["plan", f"--model={folder}", "--gpu_memory=2GB", "--num_gpus=2", "--batch_seconds=40"]
        assert main([*words, "--max_duration_in_seconds=10", "--json"]) == 0
    (text,) = printed
    return {"folder": folder, **json.loads(text)}


def test_json_holds_every_configuration_twice(plan: dict[str, Any]) -> None:
    shipped = {"plain", *(path.stem for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json"))}
    found = [(each["configuration"], each["gradient_checkpointing"]) for each in plan["configurations"]]
    assert sorted(found) == sorted((name, checkpointing) for name in shipped for checkpointing in (False, True))
    for each in plan["configurations"]:
        parts = ("parameters_bytes", "gradients_bytes", "optimizer_bytes", "communication_bytes")
        activations = each["activations_bytes"]
        assert set(activations) == {"front_end", "encoder", "loss_head"}
        assert each["card_bytes"] >= sum(each[part] for part in parts) + sum(activations.values())
        assert each["fits"] == (each["card_bytes"] <= plan["usable_bytes"])
    assert plan["usable_bytes"] == usable_bytes(2 * 10**9)


def test_the_command_is_one_that_pretrain_takes(plan: dict[str, Any]) -> None:
    words = shlex.split(plan["recommendation"]["command"])
    assert words[:7] == ["deepspeed", "--num_gpus", "2", "--module", "trainer", "pretrain", "--model_name_or_path"]
    arguments = parse_arguments(words[6:])
    assert arguments.model_name_or_path == str(plan["folder"]) and arguments.bf16
    assert arguments.deepspeed == plan["recommendation"]["configuration"] == "zero2"
    assert arguments.max_batch_seconds == 40 and arguments.max_duration_in_seconds == 10
    assert not arguments.gradient_checkpointing


def test_a_path_in_the_command_is_one_word_for_the_shell() -> None:
    request = dataclasses.replace(_resolve(), model="/my models/first one/config.json", recipe={})
    arguments = parse_arguments(shlex.split(command(request, _need("zero2", False, 80), 75.0))[6:])
    assert arguments.model_name_or_path == request.model and arguments.output_dir == "runs/first one"
    assert arguments.min_duration_in_seconds == arguments.max_duration_in_seconds == 2.0  # its default is more


def test_the_table_can_be_read_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("plain", "zero"))]
    assert len(rows) >= 4 and len({len(row) for row in rows}) == 1
    assert all(len(line) <= 120 for line in lines)
    (start,) = (number for number, line in enumerate(lines) if "deepspeed --num_gpus" in line)
    words = shlex.split("\n".join(lines[start:]).replace("\\\n", " "))
    assert parse_arguments(words[6:]).config == "demo"


def _need(name: str, checkpointing: bool, largest: float, host: int = 0) -> Need:
    """One that fits batches of up to `largest` seconds, of a megabyte each."""
    from trainer.memory.activations import Activations
    from trainer.memory.states import StateBytes

    card = usable_bytes(4 * 10**9) - round(largest * 1e6) + 75 * 10**6
    states = StateBytes(card, 0, 0, 0, 0, offloaded=0, host=host)
    return Need(name, checkpointing, states, Activations(0, 0, 0), largest)


def test_the_cheapest_that_fits_is_recommended() -> None:
    request = dataclasses.replace(_resolve(), batch_seconds=75.0)
    found = [_need("zero2", False, 60), _need("zero2", True, 80), _need("zero2_offload", False, 300)]
    assert recommend(request, found) == (found[1], 75.0)
    assert recommend(request, [found[0], found[2]]) == (found[2], 75.0)
    assert recommend(request, [found[0]]) == (found[0], 60.0)  # less than what was asked
    assert recommend(request, [_need("zero2", False, 0)]) == (None, 0.0)
    assert recommend(request, [_need("plain", False, 500)]) == (None, 0.0)  # DeepSpeed is what this is about
    assert "--gradient_checkpointing true" in command(request, found[1], 75.0)


def test_less_than_was_asked_still_holds_a_whole_utterance() -> None:
    request = dataclasses.replace(_resolve(), batch_seconds=75.0, utterance_seconds=15.625)
    assert recommend(request, [_need("zero2", False, 15.9)])[1] == 15.625
    short = dataclasses.replace(request, utterance_seconds=0.5)
    assert recommend(short, [_need("zero2", False, 0.9)])[1] == 0.5


def test_the_command_lets_a_batch_have_the_seconds_that_were_planned() -> None:
    """The recipe of `demo` has up to 8 utterances in a batch, of 2 s."""
    need = _need("zero2", False, 300)
    assert "--per_device_train_batch_size" not in command(_resolve(), need, 16.0)
    assert "--per_device_train_batch_size 51 " in command(_resolve(), need, 101.0)


def test_the_host_counts_where_its_memory_is_known() -> None:
    found = [_need("zero2", False, 60), _need("zero2_offload", False, 300, host=50 * 10**9)]
    request = dataclasses.replace(_resolve(), batch_seconds=75.0, num_gpus=2)
    assert recommend(request, found)[0] == found[1]
    assert recommend(dataclasses.replace(request, cpu_memory=128 * 10**9), found)[0] == found[1]
    assert recommend(dataclasses.replace(request, cpu_memory=64 * 10**9), found) == (found[0], 60.0)
