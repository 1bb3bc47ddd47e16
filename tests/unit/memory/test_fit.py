"""What fits: states by ZeRO stage, the curve over utterances, and the largest micro-batch."""

import dataclasses
from typing import Any

import pytest

from trainer.memory.activations import Activations, Workload, count_activations
from trainer.memory.fit import Curve, needs, usable_bytes
from trainer.memory.states import HOST_BYTES_PER_RANK, ModelNumbers, deepspeed_states, plain_states
from trainer.model.sizes import shipped_config
from trainer.run.ds_config import load_ds_config, shipped_configs

MILLION = 10**6
MODEL = ModelNumbers(trained=100 * MILLION, frozen=20 * MILLION, largest=4 * MILLION, hidden_size=1000)
CPU = {"device": "cpu"}


def _zero(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 10 * MILLION, **more}
    return {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}


def _million(value: int) -> float:
    return value / MILLION


def test_plain_holds_everything_on_every_card() -> None:
    states = plain_states(MODEL)
    assert [_million(x) for x in (states.parameters, states.gradients, states.optimizer)] == [480, 400, 800]
    assert _million(states.communication) == 400


def test_zero2_shares_gradients_and_optimizer() -> None:
    one, four = (deepspeed_states(MODEL, ranks, _zero(2), bf16=True) for ranks in (1, 4))
    assert [_million(x) for x in (one.parameters, one.gradients, one.optimizer)] == [240, 400, 1200]
    assert [_million(x) for x in (four.parameters, four.gradients, four.optimizer)] == [240, 100, 300]
    # the bucket and its flattened copy in bf16, a tensor of it in fp32
    assert _million(four.communication) == 2 * 2 * 10 + 4 * 4
    overlapping = deepspeed_states(MODEL, 4, _zero(2, overlap_comm=True), bf16=True)
    assert _million(overlapping.communication - four.communication) == 2 * 10


def test_zero2_in_fp32_and_with_bf16_gradients() -> None:
    assert _million(deepspeed_states(MODEL, 1, _zero(2), bf16=False).parameters) == 480
    in_bf16 = {**_zero(2), "data_types": {"grad_accum_dtype": "bf16"}}
    assert _million(deepspeed_states(MODEL, 1, in_bf16, bf16=True).gradients) == 200
    assert _million(deepspeed_states(MODEL, 1, {**_zero(2), "data_types": {}}, bf16=True).gradients) == 200


def test_zero2_offload_moves_the_optimizer_to_the_host() -> None:
    states = deepspeed_states(MODEL, 2, _zero(2, offload_optimizer=CPU), bf16=True)
    assert (_million(states.gradients), states.optimizer) == (200, 0)  # fp32 gradients add up on the card
    assert _million(states.host - HOST_BYTES_PER_RANK) == (12 + 4 + 2) * 50
    in_bf16 = {**_zero(2, offload_optimizer=CPU), "data_types": {}}
    states = deepspeed_states(MODEL, 2, in_bf16, bf16=True)
    assert (states.gradients, states.optimizer) == (0, 0)
    assert _million(states.host - HOST_BYTES_PER_RANK) == (12 + 4 + 2 + 2) * 50


def test_zero3_shares_the_weights_and_gathers_some() -> None:
    limits = {"stage3_max_reuse_distance": 40 * MILLION, "stage3_prefetch_bucket_size": 5 * MILLION}
    four = deepspeed_states(MODEL, 4, _zero(3, **limits), bf16=True)
    assert _million(four.parameters) == 2 * 120 / 4 + 2 * (40 / 2 + 5 + 4)
    assert _million(deepspeed_states(MODEL, 1, _zero(3, **limits), bf16=True).parameters) == 240  # nothing to gather
    # DeepSpeed's defaults are too large for anything to be given back
    assert _million(deepspeed_states(MODEL, 4, _zero(3), bf16=True).parameters) == 2 * 120 / 4 + 2 * 120
    assert four.only_in_step == 4 * 25 * MILLION
    small_steps = deepspeed_states(MODEL, 4, _zero(3, sub_group_size=10 * MILLION), bf16=True)
    assert small_steps.only_in_step == 4 * 10 * MILLION


def test_zero3_offload_leaves_the_card_to_activations() -> None:
    limits = {"stage3_max_reuse_distance": 40 * MILLION, "stage3_prefetch_bucket_size": 5 * MILLION}
    states = deepspeed_states(MODEL, 4, _zero(3, **limits, offload_optimizer=CPU, offload_param=CPU), bf16=True)
    assert _million(states.parameters) == 2 * (40 / 2 + 5 + 4)
    assert (states.gradients, states.optimizer, states.disk) == (0, 0, 0)
    assert _million(states.host - HOST_BYTES_PER_RANK) == 2 * 30 + (4 + 12 + 4) * 25
    on_disk = _zero(3, **limits, sub_group_size=10 * MILLION, offload_optimizer={"device": "nvme", "buffer_count": 5})
    states = deepspeed_states(MODEL, 4, on_disk, bf16=True)
    assert _million(states.disk) == 16 * 25
    assert _million(states.host - HOST_BYTES_PER_RANK) == max(4 * 120, 4 * 25 + 5 * 4 * 10)


def test_auto_means_what_accelerate_writes() -> None:
    written = deepspeed_states(MODEL, 2, _zero(2, reduce_bucket_size=MODEL.hidden_size**2), bf16=True)
    assert deepspeed_states(MODEL, 2, _zero(2, reduce_bucket_size="auto"), bf16=True) == written


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_file_can_be_read(name: str) -> None:
    states = deepspeed_states(MODEL, 2, load_ds_config(name), bf16=True)
    assert all(value >= 0 for value in dataclasses.astuple(states)) and states.card > 0
    on_host = "offload" in name or "nvme" in name
    assert (states.optimizer == 0) == on_host


def _activations(total: int) -> Activations:
    return Activations(front_end=total, encoder=0, loss_head=0)


def test_the_curve_runs_through_what_was_counted_and_on() -> None:
    curve = Curve((1, 8, 64), [_activations(total) for total in (10, 80, 1200)])
    assert [curve.at(number).total for number in (1, 4.5, 8, 36, 64, 120)] == [10, 45, 80, 640, 1200, 2320]
    assert [curve.largest(total) for total in (9, 10, 45, 80, 640, 1200, 2320)] == [0, 1, 4.5, 8, 36, 64, 120]


def test_no_part_falls_below_nothing_beyond_what_was_counted() -> None:
    """With few utterances the peak is in the encoder, with many in the front end."""
    far = Curve((1, 32), [Activations(40, 60, 0), Activations(3200, 0, 0)]).at(320)
    assert far.encoder == 0 and far.total == pytest.approx(100 + (3200 - 100) / 31 * 319, abs=2)


@pytest.mark.parametrize(("casts_model", "too_high"), [(True, 0.02), (False, 0.25)])
def test_between_counted_sizes_the_curve_is_never_too_low(casts_model: bool, too_high: float) -> None:
    workload = Workload(shipped_config("demo"), 2.0, gradient_checkpointing=True, bf16=True, casts_model=casts_model)
    curve = Curve((1, 32), count_activations(workload, (1, 32)))
    numbers = (2, 5, 20, 90)
    for number, counted in zip(numbers, count_activations(workload, numbers), strict=True):
        assert curve.at(number).total >= counted.total * (0.999 if number < 32 else 0.97)
        assert curve.at(number).total <= counted.total * (1 + too_high)


def test_the_largest_micro_batch_is_where_the_card_is_full() -> None:
    workload = Workload(shipped_config("demo"), 4.0, gradient_checkpointing=False, bf16=True, casts_model=True)
    card = 4 * 10**9

    def ask(seconds: float) -> list[Any]:
        configs = {"plain": None, "zero2": load_ds_config("zero2")}
        return needs(workload, configs, num_ranks=2, batch_seconds=seconds, card_bytes=card)

    for index, need in enumerate(ask(16.0)):
        assert need.card_bytes < usable_bytes(card)
        there = ask(need.largest_seconds)[index]
        assert there.card_bytes == pytest.approx(usable_bytes(card), rel=1e-3)
        assert (there.configuration, there.gradient_checkpointing) == (need.configuration, need.gradient_checkpointing)


def test_a_card_that_not_even_an_utterance_fits() -> None:
    workload = Workload(shipped_config("demo"), 4.0, gradient_checkpointing=False, bf16=True, casts_model=True)
    (need, _) = needs(workload, {"plain": None}, num_ranks=1, batch_seconds=4.0, card_bytes=10**9)
    assert need.largest_seconds == 0 and usable_bytes(10**9) == 0
