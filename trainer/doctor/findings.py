"""What every check of the doctor yields."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the table."""

    subject: str
    found: str
    remedy: str = ""
    """Empty: all is well."""
    needed: bool = True
    """Whether training needs the remedy; otherwise it is a note."""

    @property
    def verdict(self) -> str:
        """`ok`, `note` or `WRONG`."""
        return "ok" if not self.remedy else "WRONG" if self.needed else "note"


def note(subject: str, found: str, remedy: str) -> Finding:
    """Something to know that keeps nobody from training."""
    return Finding(subject, found, remedy, needed=False)
