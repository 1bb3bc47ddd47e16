"""The one exception of this package that is meant for the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import UserError


class ConversionError(UserError):
    """The checkpoint or the request cannot be converted; the text names field or file, what is wrong and the remedy."""


@contextmanager
def known_layout(folder: Path) -> Iterator[None]:
    """Encloses what takes apart files that could be read but may hold anything."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{folder}: not laid out as DeepSpeed 0.19 saves ZeRO-1, 2 and 3 ({type(error).__name__}: {error}); take "
            "another checkpoint."
        ) from error
