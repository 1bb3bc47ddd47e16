"""The ways a command ends that are not success; `cli.py` turns them into exit codes."""


class UserError(Exception):
    """The user's input is wrong (exit code 2). The message names the value, the rule and the remedy."""


class RunWentBad(Exception):
    """Training cannot go on: it diverged or collapsed (exit code 3)."""


class CannotWrite(Exception):
    """A file of the run cannot be written: the disk is full, or has turned read-only (exit code 1).

    Raised by all ranks together with the same message. The input is not wrong: the same command goes on once there is
    room.
    """


class OutOfMemory(Exception):
    """The card or the host has no memory left (exit code 3). One rank may raise it alone."""
