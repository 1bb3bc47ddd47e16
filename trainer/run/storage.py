"""Files that all ranks depend on: where one cannot write, all end together and say why; is there room for more?"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trainer.errors import CannotWrite
from trainer.run.engine import Engine

_Result = TypeVar("_Result")


def on_all_ranks(engine: Engine, what: str, action: Callable[[], _Result], remedy: str = "") -> list[_Result]:
    """Call `action` on every rank; returns what each rank's call did, in their order. All ranks call it.

    Raises:
        CannotWrite: on all ranks, with the same message, when `action` raised `OSError` on any. A rank that left alone
            would keep the others waiting in their next collective until its timeout.
    """
    result: _Result | None = None
    problem: str | None = None
    try:
        result = action()
    except OSError as error:
        problem = error.strerror or str(error)
    outcomes = engine.gather((result, problem))
    ranks: dict[str, list[int]] = {}
    for rank, (_, said) in enumerate(outcomes):
        if said is not None:
            ranks.setdefault(said, []).append(rank)
    if ranks:
        reasons = (f"{reason} (rank {', '.join(map(str, who))})" for reason, who in ranks.items())
        raise CannotWrite(f"cannot write {what}: {'; '.join(reasons)}" + (f"; {remedy}" if remedy else "."))
    return [each for each, _ in outcomes]


def on_main_rank(engine: Engine, what: str, action: Callable[[], None], remedy: str = "") -> None:
    """`on_all_ranks` for something that only the main rank does."""
    on_all_ranks(engine, what, action if engine.is_main else lambda: None, remedy)


def free_bytes(folder: Path) -> int | None:
    """Bytes that may still be written below `folder`, which need not exist yet; None where nobody knows."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        told = os.statvfs(folder)
    except OSError:
        return None
    return told.f_bavail * told.f_frsize if told.f_blocks else None  # some network file systems say 0 of 0


def gigabytes(count: float) -> str:
    """For a person: `5.1 GB`, with more digits where it is less."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def too_little_room(folder: Path, needed: int) -> str | None:
    """What to tell where not even one checkpoint of `needed` bytes fits; None where it does or nobody knows."""
    free = free_bytes(folder)
    if free is None or free >= needed:
        return None
    return (
        f"output_dir ({folder}) has {gigabytes(free)} free, a checkpoint takes about {gigabytes(needed)}; make room "
        "there or choose another --output_dir."
    )


def scarce_room(folder: Path, needed: int, num_to_come: int) -> str | None:
    """What to tell where not all of the checkpoints fit that are still to be kept or written."""
    free = free_bytes(folder)
    if free is None or free >= needed * num_to_come:
        return None
    return (
        f"warning: {folder} has {gigabytes(free)} free; {num_to_come:,} checkpoints of about {gigabytes(needed)} are "
        "still to be kept or written there; make room, or lower --save_total_limit."
    )
