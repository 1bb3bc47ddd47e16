"""The one exception of this package that is meant for the user."""

from trainer.errors import UserError


class ConversionError(UserError):
    """The checkpoint or the request cannot be converted; the text names field or file, what is wrong and the remedy."""
