"""Shards, sizes, streaming, and the folder that appears whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import trainer
from trainer.convert.errors import ConversionError
from trainer.convert.safe_load import safe_load
from trainer.convert.verify import check_written
from trainer.convert.weights import Weight, same_bits, whole
from trainer.convert.writer import check_destination, parse_size, plan_shards, published_folder, write_shards

PEAK_MEMORY = """
import sys
from pathlib import Path
import numpy
from trainer.convert.safe_load import safe_load
from trainer.convert.verify import check_written
from trainer.convert.weights import whole
from trainer.convert.writer import plan_shards, write_shards

def peak():  # VmHWM, not ru_maxrss: that one begins with the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

path, out, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
weights = [whole(name, tensor) for name, tensor in safe_load(path).items()]
before = peak()
write_shards(out, plan_shards(weights, dtype, 10**9), dtype)
check_written(out, weights, dtype)
assert "torch" not in sys.modules
print(peak() - before)
"""


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> list[Weight]:
    """The tensors as weights of a checkpoint."""
    torch.save(tensors, folder / "states.pt")
    return [whole(*item) for item in safe_load(folder / "states.pt").items()]


def mixed_weights() -> dict[str, torch.Tensor]:
    return {
        "odd": torch.randn(3, 5),
        "scalar": torch.tensor(7),
        "flag": torch.tensor([True, False, True]),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "empty": torch.empty(0, 2),
        "half": torch.randn(7).bfloat16(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_file_reads_back_in_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = mixed_weights()
    name = str(dtype).removeprefix("torch.")
    weights = stored(tmp_path, tensors)
    write_shards(tmp_path, plan_shards(weights, name, 10**9), name)
    check_written(tmp_path, weights, name)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert same_bits(loaded[name], wanted), name
    with safe_open(tmp_path / "model.safetensors", framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    content = (tmp_path / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    for name, tensor in loaded.items():  # readers map the file and need every element at a multiple of its size
        assert (8 + header_bytes + header[name]["data_offsets"][0]) % tensor.itemsize == 0, name


def test_shards_stay_below_the_limit_and_the_index_lists_all(tmp_path: Path) -> None:
    sizes = [30, 30, 30, 200, 10]  # elements; the limit of 400 bytes holds 100
    weights = stored(tmp_path, {f"w{n}": torch.randn(size) for n, size in enumerate(sizes)})
    shards = plan_shards(weights, "float32", 400)
    write_shards(tmp_path, shards, "float32")
    names = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [(shard.file_name, [w.name for w in shard.weights]) for shard in shards] == [
        (names[0], ["w0", "w1", "w2"]),
        (names[1], ["w3"]),
        (names[2], ["w4"]),
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 300, "total_size": 1200}
    assert {name: list(load_file(tmp_path / file)) for name, file in index["weight_map"].items()} == {
        "w0": ["w0", "w1", "w2"],
        "w1": ["w0", "w1", "w2"],
        "w2": ["w0", "w1", "w2"],
        "w3": ["w3"],
        "w4": ["w4"],
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_weights(tmp_path: Path, dtype: str) -> None:
    """In a process of its own: 400 MB of weights in two tensors are written and compared in 40 MB beyond NumPy."""
    num_elements = 50_000_000
    torch.save({str(n): torch.full((num_elements,), 1.5) for n in range(2)}, tmp_path / "states.pt")
    command = [sys.executable, "-c", PEAK_MEMORY, str(tmp_path / "states.pt"), str(tmp_path), dtype]
    environment = os.environ | {"PYTHONPATH": str(Path(trainer.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40_000_000
    assert (tmp_path / "model.safetensors").stat().st_size > 2 * num_elements * {"float32": 4, "bfloat16": 2}[dtype]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2kib", 2048), ("1TB", 10**12)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0GB", "5 G", "five GB", ""])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConversionError, match="max_shard_size"):
        parse_size(text)


def test_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with published_folder(out) as staging:
        (staging / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("existing", ["none", "empty", "filled"])
def test_failure_leaves_everything_as_it_was(tmp_path: Path, existing: str) -> None:
    out = tmp_path / "out"
    if existing != "none":
        out.mkdir()
    if existing == "filled":
        (out / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), published_folder(out) as staging:
        (staging / "file").write_text("x")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ([] if existing == "none" else ["out"])
    assert existing == "none" or [path.name for path in out.iterdir()] == (["old"] if existing == "filled" else [])


@pytest.mark.parametrize("existing", ["empty", "filled"])
def test_existing_folder_is_replaced_as_a_whole(tmp_path: Path, existing: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if existing == "filled":
        (out / "old").write_text("old")
    with published_folder(out) as staging:
        (staging / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")

    def rename(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise OSError("disk trouble")
        source.replace(target)

    monkeypatch.setattr("trainer.convert.writer.os.rename", rename)
    with pytest.raises(OSError, match="disk trouble"), published_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["old"]


def test_destination_rules(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    for overlapping in (checkpoint, checkpoint / "out", tmp_path / "run"):
        with pytest.raises(ConversionError, match="must lie apart"):
            check_destination(overlapping, checkpoint, overwrite=True)
    out = tmp_path / "out"
    check_destination(out, checkpoint, overwrite=False)
    out.mkdir()
    check_destination(out, checkpoint, overwrite=False)
    (out / "thesis.tex").write_text("x")
    with pytest.raises(ConversionError, match="is not empty"):
        check_destination(out, checkpoint, overwrite=False)
    with pytest.raises(ConversionError, match="is not a model folder"):
        check_destination(out, checkpoint, overwrite=True)
    (out / "config.json").write_text("{}")
    check_destination(out, checkpoint, overwrite=True)
    with pytest.raises(ConversionError, match="is a file"):
        check_destination(out / "config.json", checkpoint, overwrite=True)


def test_a_checkpoint_is_never_replaced_nor_written_into(tmp_path: Path) -> None:
    """Those of other updates and runs hold a config.json, as model folders do."""
    checkpoint, other = (tmp_path / "run" / "checkpoints" / name for name in ("step-00000006", "step-00000002"))
    for folder in (checkpoint, other):
        folder.mkdir(parents=True)
        for name in ("config.json", "trainer_state.json"):
            (folder / name).write_text("{}")
    for out in (other, other / "out", other / "new" / "out"):
        with pytest.raises(ConversionError, match="must lie apart"):
            check_destination(out, checkpoint, overwrite=True)
    with pytest.raises(ConversionError, match="has the name of a checkpoint"):
        check_destination(checkpoint.with_name("step-00000007"), checkpoint, overwrite=False)
    check_destination(tmp_path / "run" / "out", checkpoint, overwrite=False)


def test_what_was_put_there_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="not empty"), published_folder(out, overwrite=False) as staging:
        (staging / "new").write_text("new")
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [out]
