"""What a run is told about its memory: before it starts, and when there was too little."""

import dataclasses
import errno
from typing import Any

import numpy as np
import pytest
import torch

from trainer.arguments import PretrainArguments
from trainer.data.audio import SAMPLE_RATE
from trainer.data.batching import Batching, Limits
from trainer.errors import OutOfMemory
from trainer.memory import demand as demand_module
from trainer.memory.demand import Demand, demand_of, explaining_out_of_memory, is_out_of_memory, warning_where_too_much
from trainer.model.sizes import shipped_config

ALLOCATION = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "307152000 bytes. Error code 12 (Cannot allocate memory)"
)


def _demand(seconds: float | None = 40.0, batch_size: int = 8, longest: float = 10.0, **flags: Any) -> Demand:
    """On utterances of 2 and `longest` seconds, cropped to 10."""
    arguments = PretrainArguments(
        max_batch_seconds=seconds, per_device_train_batch_size=batch_size, max_duration_in_seconds=10.0, **flags
    )
    samples = round((seconds or batch_size * 10.0) * SAMPLE_RATE)
    lengths = np.array([2 * SAMPLE_RATE, round(longest * SAMPLE_RATE)])
    batching = Batching(lengths, Limits(samples, batch_size, 10 * SAMPLE_RATE), seed=0)
    return demand_of(arguments, shipped_config("demo"), None, batching, num_ranks=1, cuda=False)


@pytest.mark.parametrize(
    ("settings", "utterance", "batch", "flag"),
    [
        ({}, 10, 40, "--max_batch_seconds (40)"),
        ({"longest": 30.0}, 10, 40, "--max_batch_seconds (40)"),
        ({"longest": 4.0}, 4, 32, "--per_device_train_batch_size (8)"),
        ({"seconds": None}, 10, 80, "--per_device_train_batch_size (8)"),
        ({"seconds": 5.0}, 5, 5, "--max_batch_seconds (5)"),
    ],
)
def test_the_largest_micro_batch_and_the_flag_that_sets_it(
    settings: dict[str, Any], utterance: float, batch: float, flag: str
) -> None:
    demand = _demand(**settings)
    assert (demand.workload.utterance_seconds, demand.batch_seconds, demand.flag) == (utterance, batch, flag)


def test_a_run_that_fits_is_not_warned() -> None:
    assert warning_where_too_much(_demand(), 24 * 10**9) is None


def test_a_run_that_does_not_fit_is_told_the_numbers_and_what_would() -> None:
    warning = warning_where_too_much(_demand(seconds=4000.0, batch_size=400), 8 * 10**9)
    assert warning is not None
    assert "warning: micro-batches of 4000.0 s need about" in warning and "this one has 7.5 GiB" in warning
    rows = [line.split() for line in warning.splitlines() if line.startswith("plain")]
    assert [row[1] for row in rows] == ["no", "yes"] and rows[0][10] == "NO"
    longest = [int(row[11].replace(",", "")) for row in rows]
    assert 0 < longest[0] < longest[1]
    assert f"lower --max_batch_seconds (4000): up to {longest[0]:,} s fit" in warning
    assert f"add --gradient_checkpointing: then up to {longest[1]:,} s fit" in warning
    smaller = dataclasses.replace(_demand(), batch_seconds=float(longest[0]))
    assert warning_where_too_much(smaller, 8 * 10**9) is None


def test_what_is_on_already_is_not_advised() -> None:
    warning = warning_where_too_much(_demand(4000.0, 400, gradient_checkpointing=True), 10**9)
    assert warning is not None and "--gradient_checkpointing" not in warning


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError(ALLOCATION), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_error_of_another_kind_goes_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explaining_out_of_memory(_demand()):
        raise RuntimeError("shapes")


def test_the_explanation_has_the_numbers_and_holds_nothing() -> None:
    released: list[str] = []

    class Tensors:
        def __del__(self) -> None:
            released.append("tensors")

    def update() -> None:
        held = Tensors()
        raise RuntimeError(ALLOCATION + f"\nsecond line of {type(held).__name__}")

    with pytest.raises(OutOfMemory) as caught, explaining_out_of_memory(_demand()):
        update()
    assert released == ["tensors"]
    text = str(caught.value)
    assert "you tried to allocate 307152000 bytes" in text and "second line" not in text
    assert "micro-batches of 40.0 s need about" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("plain")] == ["no", "yes"]
    assert "to change: lower --max_batch_seconds (40); add --gradient_checkpointing;" in text


def test_no_memory_even_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(demand_module, "needs", fail)
    with pytest.raises(OutOfMemory) as caught, explaining_out_of_memory(_demand()):
        raise MemoryError
    assert str(caught.value).startswith("out of memory: no memory left\nto change: lower --max_batch_seconds (40);")
