"""The ways a command ends that are not success; `cli.py` turns them into exit codes."""


class UserError(Exception):
    """The user's input is wrong (exit code 2). The message names the value, the rule and the remedy."""


class RunWentBad(Exception):
    """Training cannot go on: it diverged or collapsed (exit code 3)."""
