"""The arithmetic of ZeRO's partitions against a direct simulation of how DeepSpeed lays parameters out."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.convert.partition import Piece, cut_group, cut_parameters, pieces

NUMELS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
WORLD_SIZES = st.integers(1, 7)


def parameters(numels: list[int]) -> list[torch.Tensor]:
    values = itertools.count(1)
    return [torch.tensor([next(values) for _ in range(numel)]) for numel in numels]


def padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, -len(tensor) % multiple), value=-1)


def gather(parts: list[torch.Tensor], where: list[Piece]) -> torch.Tensor:
    return torch.cat([parts[piece.part][piece.start : piece.stop] for piece in where])


@settings(deadline=None)
@given(numels=NUMELS, world_size=WORLD_SIZES, align=st.sampled_from([1, 4]), keep_padding=st.booleans())
def test_group_vector_cut_over_ranks(numels: list[int], world_size: int, align: int, keep_padding: bool) -> None:
    wanted = parameters(numels)
    aligned = [padded(parameter, align) for parameter in wanted]
    paddings = [len(after) - len(before) for before, after in zip(wanted, aligned, strict=True)]
    vector = torch.cat(aligned)
    parts = list(padded(vector, 2 * world_size).chunk(world_size))
    if not keep_padding:
        size = len(parts[0])
        parts = [vector[rank * size : (rank + 1) * size] for rank in range(world_size)]
    cut = cut_group([len(part) for part in parts], numels, paddings)
    for parameter, where in zip(wanted, cut, strict=True):
        assert torch.equal(gather(parts, where), parameter)


@settings(deadline=None)
@given(numels=NUMELS, world_size=WORLD_SIZES, data=st.data())
def test_parameters_cut_over_ranks_and_groups(numels: list[int], world_size: int, data: st.DataObject) -> None:
    wanted = parameters(numels)
    shares = [padded(parameter, world_size).chunk(world_size) for parameter in wanted]
    bounds = sorted(data.draw(st.sets(st.integers(1, len(numels)), max_size=3)) | {0, len(numels)})
    parts = [
        [torch.cat([share[rank] for share in shares[first:last]]) for first, last in itertools.pairwise(bounds)]
        for rank in range(world_size)
    ]
    cut = cut_parameters([[len(part) for part in own] for own in parts], numels)
    flat = [part for own in parts for part in own]
    for parameter, where in zip(wanted, cut, strict=True):
        assert torch.equal(gather(flat, where), parameter)


def test_pieces_cross_empty_and_short_parts() -> None:
    assert pieces([3, 0, 2, 4], 1, 7) == [Piece(0, 1, 3), Piece(2, 0, 2), Piece(3, 0, 2)]
    assert pieces([3, 2], 3, 3) == []


@pytest.mark.parametrize("lengths", [[5, 4], [7, 7]])
def test_group_of_another_size_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="where the parameters need 10"):
        cut_group(lengths, [4, 6], [0, 0])


def test_rank_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 1 holds 4 elements where its shares need 5"):
        cut_parameters([[5], [3, 1]], [4, 6])
