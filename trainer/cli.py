"""`trainer COMMAND`: finds the command, imports only what it needs, turns how it ended into an exit code."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from trainer.ending import end_at_once, leave
from trainer.errors import CannotWrite, OutOfMemory, RunWentBad, UserError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_WENT_BAD = 3

# How gloo says that the other end of a connection is gone; NCCL waits, and the launcher ends the ranks.
_LOST_A_RANK = ("closed by peer", "reset by peer")

USAGE = """usage: trainer COMMAND [ARGUMENTS]

Pre-train wav2vec 2.0 models on unlabelled speech.

commands:
  pretrain   train a model, alone or on many ranks (trainer pretrain --help)
  prepare    read the headers of the audio, say what is in it and what cannot be used (trainer prepare --help)
  convert    turn a run or a checkpoint into a save_pretrained folder (trainer convert --help)
  plan       show what fits on a GPU of a given memory, and the command to run it (trainer plan --help)
  doctor     check the installation: versions, GPUs, disks, cluster, logins, gradients under DeepSpeed

exit codes: 0 done, 2 wrong input, 3 the run went bad, 4 stopped on request with a checkpoint saved, 1 anything else
"""


def main(command_line: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if command_line is None else command_line)
    # launchers put the local rank before the command; the environment holds the same number
    while words and words[0].startswith(("--local_rank", "--local-rank")):
        words.pop(0)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return EXIT_DONE if words else EXIT_USER_ERROR
    commands: dict[str, Callable[[list[str]], int]] = {
        "pretrain": _pretrain,
        "prepare": _prepare,
        "convert": _convert,
        "plan": _plan,
        "doctor": _doctor,
    }
    if words[0] not in commands:
        return _complain(f"unknown command {words[0]!r}; there are {', '.join(commands)}.", EXIT_USER_ERROR)
    try:
        return commands[words[0]](words[1:])
    except UserError as error:
        code = _complain(str(error), EXIT_USER_ERROR)
    except (RunWentBad, OutOfMemory) as error:
        code = _complain(str(error), EXIT_WENT_BAD)
    except CannotWrite as error:
        code = _complain(str(error), EXIT_FAILED, shared=True)
    except KeyboardInterrupt:
        code = _complain("interrupted", EXIT_FAILED)
    except Exception as error:
        if not _ranks_have_met():
            raise
        traceback.print_exc()
        code = EXIT_FAILED
        if any(words in str(error) for words in _LOST_A_RANK):
            _complain("another rank has ended; its own last lines, or the launcher's, say why.", code)
    if _ranks_have_met():
        end_at_once(code)
    return code


def program() -> NoReturn:
    """`main` as a program of its own."""
    leave(main())


def _ranks_have_met() -> bool:
    """Whether this process is in a process group of several ranks."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return False
    return bool(torch.distributed.get_world_size() > 1)


def _complain(message: str, code: int, *, shared: bool = False) -> int:
    """Print a message once per machine, or once per rank where only some may have met with the error.

    `shared`: all ranks end with this message.
    """
    rank = os.environ.get("RANK", "0")
    if (_ranks_have_met() and not shared) or os.environ.get("LOCAL_RANK", "0") == "0":
        prefix = "trainer: error: " if rank == "0" else f"trainer: error on rank {rank}: "
        for line in message.splitlines():
            print(prefix + line, file=sys.stderr, flush=True)
    return code


def _pretrain(words: list[str], command: str = "pretrain") -> int:
    from trainer.arguments import HelpRequested, parse_arguments

    try:
        arguments = parse_arguments(words, command)
    except HelpRequested as requested:
        print(requested, end="")
        return EXIT_DONE
    if arguments.preprocessing_only:
        from trainer.run.prepare import prepare

        return prepare(arguments)
    from trainer.run.ds_config import ds_config_of

    ds_config_of(arguments, int(os.environ.get("WORLD_SIZE", "1")))  # its mistakes show before torch is loaded
    from trainer.run.build import pretrain

    return pretrain(arguments)


def _prepare(words: list[str]) -> int:
    return _pretrain(words, "prepare")


def _convert(words: list[str]) -> int:
    from trainer.convert.arguments import main as convert_main

    return convert_main(words)


def _plan(words: list[str]) -> int:
    from trainer.plan import main as plan_main

    return plan_main(words)


def _doctor(words: list[str]) -> int:
    from trainer.doctor.command import main as doctor_main

    return doctor_main(words)


if __name__ == "__main__":
    program()
