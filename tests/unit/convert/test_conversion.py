"""A conversion from end to end: exact weights, stock keys, and nothing written when something is wrong."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import trainer
from trainer.convert.conversion import convert
from trainer.convert.errors import ConversionError
from trainer.convert.weights import same_bits
from trainer.convert.writer import write_shards
from trainer.convert.zero import read_zero

CopyRun = Callable[[str], Any]
WITH_NUMPY_ALONE = """
import sys

HIDDEN = ("torch", "safetensors", "transformers", "deepspeed", "accelerate")

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
from trainer.cli import main
code = main(["convert", *sys.argv[1:]])
assert not {name for name in sys.modules if name.startswith((*HIDDEN, "trainer.run"))}
assert "--no_verify" not in sys.argv or "numpy" not in sys.modules
sys.exit(code)
"""


def stock_state_dict(step_folder: Path) -> dict[str, torch.Tensor]:
    config = transformers.AutoConfig.from_pretrained(step_folder)
    model = getattr(transformers, config.architectures[0])(config)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def load(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model of a transformers class, and what it reports of missing, unexpected and mismatched keys."""
    loaded: tuple[Any, dict[str, Any]] = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    return loaded


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def test_zero_weights_are_exact_and_stock_classes_load_them(any_zero_run: Any, tmp_path: Path) -> None:
    report = convert(any_zero_run.folder, tmp_path / "out")
    assert_same(tmp_path / "out", any_zero_run.expected)
    stock = stock_state_dict(any_zero_run.step_folder)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == stock.keys()
    assert report[:6] == (
        any_zero_run.step_folder,
        tmp_path / "out",
        2,
        "deepspeed",
        "float32",
        sum(value.numel() for value in stock.values()),
    )
    model, info = load("AutoModelForPreTraining", tmp_path / "out")
    assert not any(info.values()), info
    assert type(model).__name__ in ("Wav2Vec2ForPreTraining", "Wav2Vec2ConformerForPreTraining")
    assert all(same_bits(value, any_zero_run.expected[name]) for name, value in model.state_dict().items())


def test_same_files_as_save_pretrained_and_the_same_loading(plain_run: Any, tmp_path: Path) -> None:
    convert(plain_run.folder, tmp_path / "out")
    stock = transformers.Wav2Vec2ForPreTraining.from_pretrained(tmp_path / "out")
    stock.save_pretrained(tmp_path / "stock")
    assert_same(tmp_path / "out", load_file(tmp_path / "stock" / "model.safetensors"))
    for name, shared in [
        ("Wav2Vec2Model", "wav2vec2."),
        ("Wav2Vec2ForCTC", "wav2vec2."),
        ("Wav2Vec2ForPreTraining", ""),
    ]:
        model, info = load(name, tmp_path / "out")
        assert {key for key in info["missing_keys"] if not key.startswith("lm_head")} == set()
        assert {key for key in info["unexpected_keys"] if key.startswith(shared)} == set()
        assert model.dtype == torch.float32
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (type(extractor).__name__, extractor.return_attention_mask) == ("Wav2Vec2FeatureExtractor", True)


def test_plain_checkpoint_in_shards(plain_run: Any, tmp_path: Path) -> None:
    report = convert(plain_run.step_folder, tmp_path / "out", max_shard_size="4KB")
    assert_same(tmp_path / "out", plain_run.expected)
    names = [name for name in report.files if name.startswith("model-")]
    assert len(names) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 10_000 for name in names)
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    _, info = load("Wav2Vec2ForPreTraining", tmp_path / "out")
    assert not any(info.values()), info


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_smaller_types_round_once(zero_run: CopyRun, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    run = zero_run("zero3-offload-conformer")
    convert(run.folder, tmp_path / "out", dtype=dtype)
    rounded = {name: t.to(kind) if t.is_floating_point() else t for name, t in run.expected.items()}
    assert any(not tensor.is_floating_point() for tensor in rounded.values())
    assert_same(tmp_path / "out", rounded)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == kind
    assert transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out").dtype == kind


def test_card_names_step_size_and_type(plain_run: Any, tmp_path: Path) -> None:
    report = convert(plain_run.folder, tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# Wav2Vec2ForPreTraining, step 2\n" in card
    assert f"{report.num_parameters:,} parameters in float32" in card
    assert "16000 Hz" in card


@pytest.mark.parametrize(
    ("name", "flags"),
    [("zero2", []), ("zero3-bf16-subgroups-frozen-tied", ["--dtype", "bf16"]), ("zero3", ["--no_verify"])],
)
def test_converts_where_neither_torch_nor_deepspeed_is_installed(
    zero_root: Path, tmp_path: Path, name: str, flags: list[str]
) -> None:
    """Importing torch takes longer than converting a large model, and a copy without a check needs not even NumPy."""
    environment = os.environ | {"PYTHONPATH": str(Path(trainer.__file__).parents[1])}
    command = [sys.executable, "-c", WITH_NUMPY_ALONE, str(zero_root / name), str(tmp_path / "out"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert ("verified" in done.stderr) == (not flags or "bf16" in flags)


def test_overwrite_replaces_the_whole_folder(plain_run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(plain_run.folder, out, max_shard_size="4KB", verify=False)
    with pytest.raises(ConversionError, match="is not empty"):
        convert(plain_run.folder, out, verify=False)
    assert (out / "model.safetensors.index.json").exists()
    report = convert(plain_run.folder, out, overwrite=True, verify=False)
    assert sorted(path.name for path in out.iterdir()) == sorted(report.files)
    assert "model.safetensors.index.json" not in report.files


def add_a_layer(run: Any) -> None:
    edit_config(run, num_hidden_layers=2)


def widen(run: Any) -> None:
    edit_config(run, intermediate_size=32)


def drop_a_layer(run: Any) -> None:
    edit_config(run, num_hidden_layers=0)


def name_no_class(run: Any) -> None:
    edit_config(run, architectures=["OurOwnModel"])


def unknown_model_type(run: Any) -> None:
    edit_config(run, model_type="wav3vec")


def remove_preprocessor(run: Any) -> None:
    (run.step_folder / "preprocessor_config.json").unlink()


def put_a_nan(run: Any) -> None:
    run.expected["project_hid.bias"][1] = math.nan
    save_file(run.expected, run.step_folder / "model.safetensors")


def cut_short(run: Any) -> None:
    os.truncate(run.step_folder / "model.safetensors", 5000)


def edit_config(run: Any, **changes: Any) -> None:
    path = run.step_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (add_a_layer, r"encoder\.layers\.1\.\S+ is missing.*and \d+ more"),
        (drop_a_layer, r"encoder\.layers\.0\.\S+ is not a weight of the stock model"),
        (widen, r"intermediate_dense\.weight has shape \[24, 16\] where the stock model has \[32, 16\]"),
        (name_no_class, "must name a model of transformers"),
        (unknown_model_type, "transformers cannot load it"),
        (remove_preprocessor, r"preprocessor_config\.json: missing"),
        (put_a_nan, r"project_hid\.bias has values that are not finite"),
        (cut_short, r"model\.safetensors: not a readable safetensors file"),
    ],
)
def test_damage_is_named_and_nothing_is_written(
    plain_run: Any, seal: Callable[..., None], tmp_path: Path, damage: Callable[[Any], None], message: str
) -> None:
    damage(plain_run)
    seal(plain_run.step_folder, engine="plain")
    (tmp_path / "place").mkdir()
    with pytest.raises(ConversionError, match=message):
        convert(plain_run.folder, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_overflow_of_float16_is_named(plain_run: Any, seal: Callable[..., None], tmp_path: Path) -> None:
    plain_run.expected["project_hid.bias"][1] = 1e6
    save_file(plain_run.expected, plain_run.step_folder / "model.safetensors")
    seal(plain_run.step_folder, engine="plain")
    with pytest.raises(ConversionError, match=r"dtype \(float16\) cannot hold the values of project_hid\.bias"):
        convert(plain_run.folder, tmp_path / "out", dtype="fp16")


def test_bytes_changed_on_the_way_to_disk_are_found(
    plain_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_flip(folder: Path, *rest: Any) -> None:
        write_shards(folder, *rest)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-3] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    monkeypatch.setattr("trainer.convert.conversion.write_shards", write_and_flip)
    with pytest.raises(ConversionError, match="differs from the checkpoint"):
        convert(plain_run.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["zero2", "zero3-bf16-subgroups-frozen-tied"])
def test_a_flipped_bit_in_a_partition_is_found(
    zero_run: CopyRun, seal: Callable[..., None], tmp_path: Path, name: str
) -> None:
    run = zero_run(name)
    path = (
        run.step_folder / "deepspeed" / f"{'bf16_' if 'bf16' in name else ''}zero_pp_rank_1_mp_rank_00_optim_states.pt"
    )
    used = [extent for weight in read_zero(path.parent, world_size=2) for extent in weight.extents]
    extent = next(extent for extent in used if extent.path == path)
    content = bytearray(path.read_bytes())
    content[extent.start] ^= 1  # the lowest bit of a float: it stays finite
    path.write_bytes(content)
    # The manifest of the undamaged file does not fit the tensors, which alone are read: their archive tells.
    with pytest.raises(ConversionError, match=rf"{path.name}: the bytes of .*/data/\d+ do not have the CRC-32"):
        convert(run.folder, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []
    seal(run.step_folder)  # nor does a manifest made after the damage hide it
    with pytest.raises(ConversionError, match=rf"{path.name}: the bytes of .*/data/\d+ do not have the CRC-32"):
        convert(run.folder, tmp_path / "out")


def test_a_shard_of_another_save_is_found_by_the_manifest(zero_run: CopyRun, tmp_path: Path) -> None:
    """Same sizes, same names, sound archives: only a checksum of the whole file tells it apart."""
    run = zero_run("zero2")
    path = run.step_folder / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[0] += 1
    torch.save(state, path)
    with pytest.raises(ConversionError, match=rf"{path.name}: (CRC-32 is|has \d+ bytes)"):
        convert(run.folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dtype": "int8"}, r"dtype \(int8\) must be one of"), ({"max_shard_size": "big"}, r"max_shard_size \(big\)")],
)
def test_wrong_arguments(plain_run: Any, tmp_path: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(plain_run.folder, tmp_path / "out", **arguments)  # type: ignore[arg-type]


def test_unknown_engine(plain_run: Any, seal: Callable[..., None], tmp_path: Path) -> None:
    seal(plain_run.step_folder, engine="fsdp")
    with pytest.raises(ConversionError, match=r"engine \(fsdp\) must be one of deepspeed, plain"):
        convert(plain_run.folder, tmp_path / "out")
