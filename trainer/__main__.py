"""`python -m trainer`."""

from trainer.cli import program

program()
