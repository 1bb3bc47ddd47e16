"""A checkpoint file cannot run code or lead elsewhere, and a damaged one is named."""

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.convert.errors import ConversionError
from trainer.convert.safe_load import NAMES, STAND_INS, Ignored, StoredTensor, read_count, safe_load
from trainer.convert.weights import same_bits, whole


class Payload:
    """Pickles as a call: unpickling it the ordinary way creates the file `target`."""

    def __init__(self, target: Path, function: object) -> None:
        self.target = target
        self.function = function

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, (str(self.target),)


@pytest.mark.parametrize(("function", "name"), [(os.mkdir, "mkdir"), (eval, "eval"), (Path.touch, "pathlib")])
def test_pickled_code_is_refused_by_name_and_does_not_run(tmp_path: Path, function: object, name: str) -> None:
    target = tmp_path / "ran"
    torch.save({"optimizer_state_dict": Payload(target, function)}, tmp_path / "bad.pt")
    with pytest.raises(ConversionError, match=rf"bad\.pt: refers to \S*{name}.*nothing was run"):
        safe_load(tmp_path / "bad.pt")
    assert not target.exists()


class ByGetattr:
    """Pickles as `getattr("text", "upper")`, as Python 3.11.2 pickles enum members."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return getattr, ("text", "upper")


def test_getattr_is_let_through_and_looks_nothing_up(tmp_path: Path) -> None:
    torch.save({"zero_stage": ByGetattr()}, tmp_path / "states.pt")
    assert isinstance(safe_load(tmp_path / "states.pt")["zero_stage"], Ignored)


def test_payload_would_run_in_an_ordinary_load(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "ran", os.mkdir), tmp_path / "bad.pt")
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_files_of_deepspeed_need_no_other_globals(zero_root: Path) -> None:
    files = sorted(zero_root.rglob("*_states.pt"))
    found = {name for path in files for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)}
    assert found <= set(STAND_INS)
    assert {"deepspeed.utils.tensor_fragment.fragment_address", "deepspeed.runtime.zero.config.ZeroStageEnum"} <= found


def test_no_name_stands_for_what_it_names() -> None:
    """Everything that a pickle may call is a function or class of `safe_load.py`."""
    for named in NAMES.values():
        assert named.make is None or named.make.__module__ == "trainer.convert.safe_load", named


def tensors() -> dict[str, Any]:
    base = torch.arange(24.0)
    return {
        "plain": torch.randn(3, 5),
        "slice": base[6:18].view(3, 4),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 2),
        "one_of_a_row": base[::24],
        "integers": torch.arange(-3, 3),
        "flags": torch.tensor([True, False]),
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "unusual": torch.arange(5).to(torch.uint16),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "with_hooks": torch.randn(2, requires_grad=True),
    }


def test_tensors_are_those_that_torch_loads(tmp_path: Path) -> None:
    saved: dict[str, Any] = tensors()
    saved["parameter"].note = "an attribute"
    torch.save(saved, tmp_path / "states.pt")
    found = safe_load(tmp_path / "states.pt")
    assert list(found) == list(saved)
    for name, tensor in saved.items():
        assert same_bits(
            whole(name, found[name]).read(), tensor.detach().clone(memory_format=torch.contiguous_format)
        ), name


def test_plain_values_beside_tensors(tmp_path: Path) -> None:
    ordered = OrderedDict(a=1)
    ordered.note = "an attribute, as a state dict's _metadata"  # type: ignore[attr-defined]
    saved = {"size": torch.Size([2, 3]), "ordered": ordered, "nested": [{"x": (1, 2.5, None)}]}
    other = {"set": {1}, "counter": Counter("ab"), "bytes": b"x", "complex": 1j, "device": torch.device("cpu")}
    torch.save(saved | other | {"dtype": torch.float32}, tmp_path / "states.pt")
    found = safe_load(tmp_path / "states.pt")
    assert {name: found[name] for name in saved} == {"size": (2, 3), "ordered": {"a": 1}, "nested": saved["nested"]}
    assert all(isinstance(found[name], Ignored) for name in other)


def test_counts() -> None:
    assert read_count(7) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
def test_counts_in_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"step": torch.tensor(5, dtype=dtype), "two": torch.ones(2)}, tmp_path / "states.pt")
    state = safe_load(tmp_path / "states.pt")
    assert read_count(state["step"]) == 5
    with pytest.raises(ConversionError, match="is not a number"):
        read_count(state["two"])


def test_tensors_that_are_not_stored_row_after_row_are_named_when_read(tmp_path: Path) -> None:
    torch.save({"turned": torch.randn(3, 4).t(), "broadcast": torch.randn(1).expand(4)}, tmp_path / "states.pt")
    state = safe_load(tmp_path / "states.pt")
    for name in ("turned", "broadcast"):
        with pytest.raises(ConversionError, match="not stored row after row"):
            whole(name, state[name])


def test_no_tensor_is_read(tmp_path: Path) -> None:
    torch.save({"big": torch.zeros(1000)}, tmp_path / "states.pt")
    big = safe_load(tmp_path / "states.pt")["big"]
    assert isinstance(big, StoredTensor) and big.extent is not None
    assert big.extent.stop - big.extent.start == 4000 and big.extent.start % 64 == 0


def test_file_cut_short_is_named(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1000)}, tmp_path / "short.pt")
    os.truncate(tmp_path / "short.pt", 2000)
    with pytest.raises(ConversionError, match=r"short\.pt: not a readable torch file"):
        safe_load(tmp_path / "short.pt")


def test_missing_file_and_other_content_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"none\.pt: missing"):
        safe_load(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConversionError, match=r"list\.pt: holds a list"):
        safe_load(tmp_path / "list.pt")
    torch.save({"x": torch.zeros(3)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match=r"legacy\.pt: not a readable torch file"):
        safe_load(tmp_path / "legacy.pt")


# What a hostile file may claim of its tensors. A storage of four floats is saved as member `data/0`.

START, END = b"\x80\x02}X\x01\x00\x00\x00x", b"s."
STORAGE = ("storage", "torch\nFloatStorage", "0", "cpu", 4)


def number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tuple_of(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def storage(kind: str = "storage", name: str = "torch\nFloatStorage", key: str = "0", numel: int = 4) -> bytes:
    return tuple_of(text(kind), f"c{name}\n".encode(), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(stored: bytes, offset: int = 0, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,)) -> bytes:
    shape, steps = (tuple_of(*map(number, numbers)) for numbers in (size, stride))
    rest = b"\x89}"  # no gradient, no hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + tuple_of(stored, number(offset), shape, steps, rest) + b"R"


def write(
    path: Path, value: bytes, members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("bad/data.pkl", START + value + END)
        archive.writestr("bad/version", "3\n")
        for name, content in (members or {"bad/byteorder": sys.byteorder.encode(), "bad/data/0": bytes(16)}).items():
            archive.writestr(name, content)


def test_the_hostile_files_are_well_formed_but_for_one_thing(tmp_path: Path) -> None:
    write(tmp_path / "good.pt", tensor(storage(), offset=1, size=(1, 3), stride=(3, 1)))
    found = safe_load(tmp_path / "good.pt")["x"]
    assert (found.shape, found.dtype) == ((1, 3), "float32")
    assert torch.load(tmp_path / "good.pt", weights_only=True)["x"].shape == (1, 3)


HOSTILE: dict[str, bytes] = {
    "more elements than the storage": tensor(storage(), size=(5,)),
    "an offset beyond it": tensor(storage(), offset=2, size=(3,)),
    "strides beyond it": tensor(storage(), size=(2, 2), stride=(3, 1)),
    "a negative offset": tensor(storage(), offset=-1, size=(2,)),
    "a negative size": tensor(storage(), size=(-4,)),
    "a negative stride": tensor(storage(), offset=3, stride=(-1,)),
    "sizes whose product overflows 64 bits": tensor(storage(), size=(2**40, 2**40), stride=(2**40, 1)),
    "fewer strides than sizes": tensor(storage(), size=(2, 2), stride=(1,)),
    "a size that is no tuple": b"ctorch._utils\n_rebuild_tensor_v2\n"
    + tuple_of(storage(), number(0), number(4), b")\x89}") + b"R",
    "a storage that is a number": tensor(number(4)),
    "too few arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    "a storage larger than its member": tensor(storage(numel=2**60)),
    "a storage smaller than its member": tensor(storage(numel=3), size=(3,)),
    "a member that is not there": tensor(storage(key="1")),
    "a member by another path": tensor(storage(key="../data/0")),
    "another kind of address": tensor(storage(kind="module")),
    "a class that is no storage": tensor(storage(name="torch\nfloat32")),
    "an address that is a number": number(5) + b"Q",
    "a parameter of a string": b"ctorch._utils\n_rebuild_parameter\n" + tuple_of(text("a"), b"\x89}") + b"R",
    "a tensor rebuilt by another name": b"ctorch._tensor\n_rebuild_from_type_v2\n"
    + tuple_of(b"cbuiltins\ngetattr\n", b"ctorch\nTensor\n", b")", b"}")
    + b"R",
    "a fragment_address of strings": b"cdeepspeed.utils.tensor_fragment\nfragment_address\n)\x81}"
    + text("numel") + text("a") + b"s" + text("start") + text("b") + b"sb",
    "an ordered dict of pairs": b"ccollections\nOrderedDict\n" + tuple_of(b"]") + b"R",
    "the state of a tensor": tensor(storage()) + b"}b",
}  # fmt: skip


@pytest.mark.parametrize("claim", HOSTILE)
def test_claims_that_the_file_does_not_bear_out(tmp_path: Path, claim: str) -> None:
    write(tmp_path / "bad.pt", HOSTILE[claim])
    with pytest.raises(ConversionError, match=r"bad\.pt: damaged, or not written by torch"):
        safe_load(tmp_path / "bad.pt")


@pytest.mark.parametrize("name", ["torch._utils\n_rebuild_qtensor", "torch\nload", "torch.storage\n_load_from_bytes"])
def test_other_functions_of_torch_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "bad.pt", f"c{name}\n)R".encode())
    with pytest.raises(ConversionError, match=r"bad\.pt: refers to torch"):
        safe_load(tmp_path / "bad.pt")


def no_pickle(content: bytes) -> bytes:
    return content.replace(b"data.pkl", b"data.not")


def two_pickles(content: bytes) -> bytes:
    return content.replace(b"bad/byteorder", b"too//data.pkl"[:13])


def other_order(content: bytes) -> bytes:
    return content.replace(sys.byteorder.encode(), b"middle")


def same_name_twice(content: bytes) -> bytes:
    return content.replace(b"bad/data/1", b"bad/data/0")


def moved_directory_entry(content: bytes) -> bytes:
    """The directory of the archive says of the last member that it lies where the one before it does."""
    entries = content.split(b"PK\x01\x02")
    entries[-1] = entries[-1][:38] + entries[-2][38:42] + entries[-1][42:]
    return b"PK\x01\x02".join(entries)


def longer_than_the_file(content: bytes) -> bytes:
    """The last member ends behind the file, by the directory."""
    entries = content.split(b"PK\x01\x02")
    size = struct.pack("<I", 10**6)
    entries[-1] = entries[-1][:16] + size + size + entries[-1][24:]
    return b"PK\x01\x02".join(entries)


def over_its_neighbour(content: bytes) -> bytes:
    """The member before the last reaches into the last, by the directory."""
    entries = content.split(b"PK\x01\x02")
    size = struct.pack("<I", 200)
    entries[-2] = entries[-2][:16] + size + size + entries[-2][24:]
    return b"PK\x01\x02".join(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_pickle, "0 members named data.pkl"),
        (two_pickles, "2 members named data.pkl"),
        (other_order, "in another order"),
        (same_name_twice, "there twice"),
        (moved_directory_entry, "not where the directory says"),
        (longer_than_the_file, "ends within a tensor|overlaps"),
        (over_its_neighbour, "overlaps"),
    ],
)
def test_archives_that_torch_does_not_write(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "bad.pt"
    members = {
        "bad/byteorder": sys.byteorder.encode(),
        "bad/data/0": bytes(16),
        "bad/data/1": bytes(16),
    }
    write(path, tensor(storage()), members)
    assert safe_load(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConversionError, match=rf"bad\.pt: .*({message})"):
        safe_load(path)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "bad.pt", tensor(storage()), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ConversionError, match=r"bad\.pt: damaged, or not written by torch"):
        safe_load(tmp_path / "bad.pt")


def test_what_torch_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    """torch tells an archive from a bare pickle by its first bytes, and reads compressed members."""
    write(tmp_path / "bad.pt", tensor(storage()))
    sound = (tmp_path / "bad.pt").read_bytes()
    (tmp_path / "bad.pt").write_bytes(b"cos\nsystem\n" + sound)
    with pytest.raises(ConversionError, match=r"bad\.pt: "):
        safe_load(tmp_path / "bad.pt")
    (tmp_path / "bad.pt").write_bytes(sound)
    with zipfile.ZipFile(tmp_path / "bad.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("other/data.pkl", b"cos\nsystem\n.")
    with pytest.raises(ConversionError, match=r"bad\.pt: .*compressed members"):
        safe_load(tmp_path / "bad.pt")


def test_members_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Offsets of 64 bits stand in other fields of the archive; the file is sparse and takes no room."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("bad/data.pkl", START + tensor(storage()) + END)
        archive.writestr("bad/data/0", bytes(16))
        archive.writestr("bad/version", "3\n")
    archive_bytes = content.getvalue()
    local = archive_bytes.index(b"PK\x03\x04", 1)
    directory = archive_bytes.index(b"PK\x01\x02")
    entries = archive_bytes[directory : archive_bytes.index(b"PK\x05\x06")].split(b"PK\x01\x02")
    shift = 5 << 30
    for n in (2, 3):
        (offset,) = struct.unpack("<I", entries[n][38:42])
        extra = struct.pack("<HHQ", 1, 8, shift + offset)
        entries[n] = entries[n][:26] + struct.pack("<H", len(extra)) + entries[n][28:38] + b"\xff" * 4 + entries[n][42:]
        entries[n] += extra
    changed = b"PK\x01\x02".join(entries)
    with (tmp_path / "far.pt").open("wb") as file:
        file.write(archive_bytes[:local])
        file.seek(shift + local)
        file.write(archive_bytes[local:directory])
        at = file.tell()
        file.write(changed)
        end64 = file.tell()
        file.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, len(changed), at))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end64, 1))
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 3, 3, len(changed), 0xFFFFFFFF, 0))
    extent = safe_load(tmp_path / "far.pt")["x"].extent
    assert extent.start > shift and extent.stop - extent.start == 16
    assert torch.load(tmp_path / "far.pt", weights_only=True, mmap=True)["x"].tolist() == [0.0] * 4
