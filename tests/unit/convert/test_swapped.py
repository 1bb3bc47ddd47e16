"""Flat tensors that were on NVMe, read from a checkpoint."""

from pathlib import Path

import pytest
import torch

from trainer.convert.errors import ConversionError
from trainer.convert.swapped import noted_groups, read_swapped
from trainer.convert.weights import whole
from trainer.layout import SWAPPED_KEY, swapped_folder


def test_groups_in_memory_are_not_noted() -> None:
    assert noted_groups({SWAPPED_KEY: [None, ("3_9", 40), None]}) == {1: ("3_9", 40)}
    assert noted_groups({SWAPPED_KEY: []}) == noted_groups({}) == {}


def test_weights_and_moments_are_read_without_the_padding(tmp_path: Path) -> None:
    folder = tmp_path / swapped_folder(1)
    folder.mkdir(parents=True)
    values = torch.arange(256, dtype=torch.float32)
    (folder / "3_9.tensor.swp").write_bytes(values.numpy().tobytes())
    (folder / "exp_avg-3_9.tensor.swp").write_bytes((-values).numpy().tobytes())
    for sign, moment in ((1, None), (-1, "exp_avg")):
        found = whole("flat", read_swapped(tmp_path, 1, ("3_9", 200), moment)).read()
        assert torch.equal(found, sign * values[:200])
    with pytest.raises(ConversionError, match=r"exp_avg_sq-3_9\.tensor\.swp: is missing; copy the checkpoint again"):
        read_swapped(tmp_path, 1, ("3_9", 200), "exp_avg_sq")
    with pytest.raises(ConversionError, match=r"rank01/3_9\.tensor\.swp: is too short"):
        read_swapped(tmp_path, 1, ("3_9", 300))
    (tmp_path / "outside.tensor.swp").write_bytes(bytes(16))
    with pytest.raises(ConversionError, match="no name and length"):
        read_swapped(tmp_path, 1, ("../../outside", 4))
