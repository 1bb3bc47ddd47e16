"""`trainer COMMAND`: finds the command, imports only what it needs, turns how it ended into an exit code."""

import os
import sys
from collections.abc import Callable, Sequence

from trainer.errors import RunWentBad, UserError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_WENT_BAD = 3

USAGE = """usage: trainer COMMAND [ARGUMENTS]

Pre-train wav2vec 2.0 models on unlabelled speech.

commands:
  pretrain   train a model, alone or on many ranks (trainer pretrain --help)
  convert    turn a run or a checkpoint into a save_pretrained folder (trainer convert --help)

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
    commands: dict[str, Callable[[list[str]], int]] = {"pretrain": _pretrain, "convert": _convert}
    if words[0] not in commands:
        return _complain(f"unknown command {words[0]!r}; there are {', '.join(commands)}.", EXIT_USER_ERROR)
    try:
        return commands[words[0]](words[1:])
    except UserError as error:
        return _complain(str(error), EXIT_USER_ERROR)
    except RunWentBad as error:
        return _complain(str(error), EXIT_WENT_BAD)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_FAILED)


def _complain(message: str, code: int) -> int:
    """Print a message once, not once per rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        for line in message.splitlines():
            print(f"trainer: error: {line}", file=sys.stderr, flush=True)
    return code


def _pretrain(words: list[str]) -> int:
    from trainer.arguments import HelpRequested, parse_arguments

    try:
        arguments = parse_arguments(words)
    except HelpRequested as requested:
        print(requested, end="")
        return EXIT_DONE
    from trainer.run.build import pretrain

    return pretrain(arguments)


def _convert(words: list[str]) -> int:
    from trainer.convert.arguments import main as convert_main

    return convert_main(words)


if __name__ == "__main__":
    sys.exit(main())
