"""A process that has met other ranks ends with its own exit code."""

import subprocess
import sys

import pytest

# A thread of gloo is still at work when Python's objects go, as with a rank that is ahead of the others.
PROGRAM = """
import atexit, datetime, sys, torch, torch.distributed as dist
from trainer.ending import leave
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
atexit.register(print, "tidied up")
dist.all_reduce(torch.ones(1 << 20), async_op=True)
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 2, 4])
def test_the_exit_code_is_the_one_that_was_given(code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "tidied up\n"), done.stderr


def test_a_process_without_torch_ends_as_usual() -> None:
    program = "import sys; from trainer.ending import leave\ntry: leave(3)\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "False\n")
