"""A pickle is a program: these do what a checkpoint never does, and nothing comes of it but a message."""

import pickle
import struct
from typing import Any

import pytest

from trainer.convert.pickles import Buildable, Named, PickleError, UnknownName, read_pickle

START = b"\x80\x02"


class Box(Buildable):
    def __init__(self, *values: object) -> None:
        self.values = values

    def build(self, state: object) -> None:
        self.values = (state,)


NAMES = {"box.Box": Named("box.Box", Box), "box.value": Named("box.value", None)}
BOX = b"cbox\nBox\n"


def read(content: bytes) -> Any:
    return read_pickle(content, NAMES, lambda address: ("storage", address))


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 255, 256, 65536, -1, 2**31, -(2**70), True, False, None, 1.5], 7: ("x", (), ("y", "é", "z"))},
        {str(n): {"nested": (n, n + 1, n + 2, n + 3)} for n in range(2000)},
        list(range(3000)),
        {"a": {"b": {}}},
    ],
)
def test_plain_values_are_read_as_python_reads_them(value: Any) -> None:
    assert read(pickle.dumps(value, protocol=2)) == value


def test_what_is_shared_stays_shared() -> None:
    inner = ["x"]
    first, second = read(pickle.dumps((inner, inner), protocol=2))
    assert first is second


def test_names_of_the_table_make_values_and_get_their_state() -> None:
    assert read(START + BOX + b")\x81.").values == ()
    assert read(START + BOX + b"K\x01\x85R.").values == (1,)
    assert read(START + BOX + b")\x81}X\x01\x00\x00\x00aK\x01sb.").values == ({"a": 1},)
    assert read(START + b"K\x05Q.") == ("storage", 5)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "box.Box.__init__", "torch.load"])
def test_other_names_are_told_and_not_looked_up(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(UnknownName, match=module):
        read(START + f"c{module}\n{attribute}\n.".encode())


PROGRAMS = {
    "calls a string": b"X\x01\x00\x00\x00a)R.",
    "calls an instance": BOX + b")\x81)R.",
    "calls what nothing calls": b"cbox\nvalue\n)R.",
    "makes an object of a string": b"X\x01\x00\x00\x00a)\x81.",
    "calls with a list": BOX + b"]R.",
    "sets the state of a name": BOX + b"}b.",
    "sets the slots of a name": BOX + b"}}X\x05\x00\x00\x00valueK\x01s\x86b.",
    "sets the state of a tuple": b")}b.",
    "sets the state of a list": b"]}b.",
    "sets the state of what a storage became": b"K\x01Q}b.",
    "appends to an instance": BOX + b")\x81K\x01a.",
    "appends to a tuple": b")K\x01a.",
    "sets items of an instance": BOX + b")\x81K\x01K\x01s.",
    "sets items of a list": b"]K\x00K\x01s.",
    "has a key without a value": b"}(K\x01u.",
    "has a tuple as a key": b"})K\x01s.",
    "has a name as a key": b"}" + BOX + b"K\x01s.",
    "has an instance as a key": b"}" + BOX + b")\x81K\x01s.",
    "pops an empty stack": b"a.",
    "pops what lies below a mark": b"K\x01(K\x02\x86.",
    "takes three of one": b"K\x01\x87.",
    "ends a mark that is none": b"t.",
    "gets what was never put": b"h\x05.",
    "puts nothing": b"q\x05.",
    "registered extension": b"\x82\x01.",
    "registered extension, long": b"\x84\x01\x00\x00\x00.",
    "name from the stack": b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.",
    "old instance": b"(cos\nsystem\n" + b"o.",
    "old instance by name": b"(ios\nsystem\n.",
    "persistent by text": b"Psomewhere\n.",
    "text integer": b"I1\n.",
    "text string": b"S'a'\n.",
    "new object with keywords": BOX + b")}\x92.",
    "long of four bytes' length": b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "frame": b"\x95" + bytes(8) + b".",
    "a string longer than the file": b"X\xff\xff\xff\xffabc.",
    "a string that is not UTF-8": b"X\x01\x00\x00\x00\xff.",
    "a name without an end": b"cos\nsystem",
    "no end": b"K\x01",
    "nothing": b"",
    "an end at once": b".",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_that_torch_does_not_write(program: str) -> None:
    before = dict(vars(Box))
    with pytest.raises((PickleError, UnknownName)):
        read(START + PROGRAMS[program])
    assert dict(vars(Box)) == before


@pytest.mark.parametrize("protocol", [0, 3, 4, 5])
def test_other_protocols(protocol: int) -> None:
    with pytest.raises(PickleError):
        read(pickle.dumps({"a": 1}, protocol=protocol))


def test_nesting_without_end() -> None:
    deep = START + b")" + b"\x85" * 100_000 + b"."
    cycle = START + b"]q\x01h\x01a."
    wide = START + b"]q\x01" + b"".join(b"(h\x01h\x01h\x01t" + b"r" + struct.pack("<I", 1) for _ in range(30))
    # a thousand references to each of a thousand lists, twice over: small to write, a thousand million to follow
    thousand = b"q\x01".join([b"]", b"(" + b"N" * 1000 + b"e"])
    for _ in range(2):
        thousand += b"q\x01" + b"](" + b"h\x01" * 1000 + b"e"
    for program in (deep, cycle, wide + b".", START + thousand + b"."):
        with pytest.raises(PickleError, match="nested more than"):
            read(program)
