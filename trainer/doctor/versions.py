"""Python and packages: the versions that are asked for, and those that are known to be bad together."""

import os
import sys
from collections.abc import Iterator
from importlib import metadata

from trainer.doctor.findings import Finding, note

_PACKAGE = "speech-pretrainer"
_SET_UP = "bash launch/setup.sh"
INCOMPLETE = f"{_SET_UP}, then . launch/env.sh"
# Package, versions and what they do. Said besides what pyproject.toml asks for, which does not say why.
_KNOWN_BAD = (
    ("deepspeed", ">=0.18.3,<0.19.7", "divides gradients by the accumulation steps without a word"),
    ("transformers", ">=5.24", "losses and gradients were not compared with ours (tests/parity)"),
)


def versions() -> Iterator[Finding]:
    """Python and each package this one depends on, against the range it asks for."""
    yield Finding("python", sys.version.split()[0])
    try:
        import torch  # noqa: F401
        from packaging.requirements import Requirement
    except ModuleNotFoundError as missing:
        yield Finding(str(missing.name), "not installed for this Python", INCOMPLETE)
        return
    try:
        asked_for = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield Finding(_PACKAGE, "not installed, so nothing says which versions it needs", _SET_UP)
        return
    for text in asked_for:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", _SET_UP)
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        asked = f" (asked for: {requirement.specifier})" if requirement.specifier else ""
        yield Finding(requirement.name, found + asked + known_bad(requirement.name, found), "" if fits else _SET_UP)
    yield from _shared_extensions_folder()


def known_bad(name: str, version: str) -> str:
    """What a version does, as `: words`; empty where nothing is known against it."""
    from packaging.specifiers import SpecifierSet

    for bad_name, versions_, what in _KNOWN_BAD:
        if name == bad_name and SpecifierSet(versions_).contains(version, prereleases=True):
            return f": {what}"
    return ""


def _shared_extensions_folder() -> Iterator[Finding]:
    """A folder of the user's own in which two versions of DeepSpeed or torch may meet."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen and not all(metadata.version(name) in chosen for name in ("torch", "deepspeed")):
        yield note(
            "TORCH_EXTENSIONS_DIR", f"{chosen} does not name the versions of torch and DeepSpeed",
            "unset it, and each pair of versions has a folder of its own: others load its binaries",
        )  # fmt: skip
