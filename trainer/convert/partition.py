"""Where a parameter lies in the flat partitions of ZeRO: arithmetic only, no files.

ZeRO-1 and 2 lay the parameters of an optimizer group end to end and cut that one vector over the ranks. ZeRO-3 cuts
every parameter over the ranks (in equal shares, the last ones padded) and each rank lays its shares end to end.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class Piece(NamedTuple):
    """Elements `start` to `stop` of the flat tensor with index `part`."""

    part: int
    start: int
    stop: int


def pieces(lengths: Sequence[int], start: int, stop: int) -> list[Piece]:
    """Where the elements `start` to `stop` of a concatenation of parts of these `lengths` lie in them, in order."""
    found = []
    for part, (end, length) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
        begin = end - length
        first, last = max(start, begin), min(stop, end)
        if first < last:
            found.append(Piece(part, first - begin, last - begin))
    return found


def cut_group(lengths: Sequence[int], numels: Sequence[int], paddings: Sequence[int]) -> list[list[Piece]]:
    """ZeRO-1 and 2: the pieces of every parameter of one optimizer group.

    Args:
        lengths: elements of each rank's partition.
        numels: elements of each parameter.
        paddings: elements left free after each parameter.

    Raises:
        ValueError: the partitions do not hold as many elements as the parameters need.
    """
    needed = sum(numels) + sum(paddings)
    # The vector is aligned to 2 x ranks, and the padding this leaves at its end may be saved or not.
    if not 0 <= sum(lengths) - needed < 2 * len(lengths):
        raise ValueError(f"the shards hold {sum(lengths)} elements where the parameters need {needed}")
    stops = list(accumulate(numel + padding for numel, padding in zip(numels, paddings, strict=True)))
    starts = [0, *stops[:-1]]
    return [pieces(lengths, start, start + numel) for start, numel in zip(starts, numels, strict=True)]


def cut_parameters(lengths: Sequence[Sequence[int]], numels: Sequence[int]) -> list[list[Piece]]:
    """ZeRO-3: the pieces of every parameter; parts are numbered through all groups of rank 0, then those of rank 1, ...

    Args:
        lengths: elements of each group's partition, for each rank.
        numels: elements of each parameter.

    Raises:
        ValueError: a rank does not hold as many elements as its shares need.
    """
    world_size = len(lengths)
    needed = sum(share_numel(numel, world_size) for numel in numels)
    cut: list[list[Piece]] = [[] for _ in numels]
    first_part = 0
    for rank, own_lengths in enumerate(lengths):
        if sum(own_lengths) != needed:
            raise ValueError(
                f"the shard of rank {rank} holds {sum(own_lengths)} elements where its shares need {needed}"
            )
        start = 0
        for found, numel in zip(cut, numels, strict=True):
            own = pieces(own_lengths, start, start + used_numel(numel, world_size, rank))
            found.extend(piece._replace(part=first_part + piece.part) for piece in own)
            start += share_numel(numel, world_size)
        first_part += len(own_lengths)
    return cut


def share_numel(numel: int, world_size: int) -> int:
    """Elements of every rank's share of a parameter under ZeRO-3, padding included."""
    return -(-numel // world_size)


def used_numel(numel: int, world_size: int, rank: int) -> int:
    """Elements of this rank's share that are the parameter's own; the rest of the share is padding."""
    share = share_numel(numel, world_size)
    return min(share, max(0, numel - rank * share))
