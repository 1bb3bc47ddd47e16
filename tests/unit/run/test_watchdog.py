"""What ends a process that makes no progress, and what does not."""

import os
import signal
import subprocess
import sys
import time

from trainer.run.watchdog import patience_seconds

_CODE = """
import sys, time
from trainer.run.watchdog import Watchdog

watchdog = Watchdog(rank=3)
watchdog.start()
watchdog.expect("starting", 60)
print("running", flush=True)
for _ in watchdog.expect_each("validation", range(6), 2):
    time.sleep(0.5)  # each in time, all together not
print("progress", flush=True)
watchdog.expect("update 8", 2)
sys.stdin.readline()
"""


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CODE], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_progress_keeps_it_quiet_and_a_hang_is_told_with_its_place() -> None:
    with _start() as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read() == "running\nprogress\n"
        assert process.wait() == 1
        told = process.stderr.read()
    assert "error on rank 3: update 8 took longer than 2 s" in told and "--resume latest" in told
    assert 'File "<string>", line' in told  # where it stands


def test_patience_is_never_less_than_the_flag_that_its_message_names() -> None:
    assert patience_seconds(600) == 1800
    assert patience_seconds(7200) == 7200


def test_the_time_a_suspended_job_did_not_run_does_not_count() -> None:
    with _start() as process:
        assert process.stdout is not None and process.stdin is not None
        while process.stdout.readline() != "progress\n":
            pass
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.2)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait() == 0
