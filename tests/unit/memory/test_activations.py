"""Counted activations against those of a real forward and backward pass on the CPU."""

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.live_memory import LiveMemory
from trainer.data.audio import SAMPLE_RATE
from trainer.data.collate import MaskSettings, collate
from trainer.data.frames import FrameGeometry
from trainer.memory.activations import Activations, Workload, count_activations, model_numbers
from trainer.model.pretraining import build_model
from trainer.model.sizes import SIZES, ModelConfig, shipped_config

LIMIT = 0.1


def _workload(config: ModelConfig, seconds: float = 2.0, **changes: Any) -> Workload:
    plain = Workload(config, seconds, gradient_checkpointing=False, bf16=False, casts_model=True, cuda=False)
    return dataclasses.replace(plain, **changes)


def _micro_batch(workload: Workload, num_utterances: int) -> Callable[[], None]:
    """Forward and backward of a real batch, after once that does not count; gradients go as soon as they exist."""
    config = workload.config
    model = build_model(config, seed=0).train()
    if workload.bf16:
        model.bfloat16()
    if workload.gradient_checkpointing:
        model.checkpoint_activations()
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    num_samples = round(workload.utterance_seconds * SAMPLE_RATE)
    rng = np.random.default_rng(0)
    batch = collate(
        [rng.standard_normal(num_samples, dtype=np.float32) for _ in range(num_utterances)],
        utterances=list(range(num_utterances)), epoch=0, seed=0,
        geometry=FrameGeometry(tuple(config.conv_kernel), tuple(config.conv_stride)),
        mask_settings=MaskSettings(config.mask_time_prob, config.mask_time_length, config.num_negatives),
    )  # fmt: skip

    def run() -> None:
        names = ("input_values", "mask", "target_frames", "target_valid", "negatives")
        model(**{name: getattr(batch, name).clone() for name in names}).loss.backward()

    run()
    return run


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _peak_of_the_allocator(run: Callable[[], None], folder: Path) -> int:
    """Most bytes that torch's CPU allocator had given out at once, kernels' own buffers included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    live = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("size", "seconds", "num_utterances", "bf16"),
    [("demo", 3.0, 4, False), ("demo", 3.0, 4, True), ("base", 3.0, 1, False)],
)
def test_counted_as_the_allocator_counts(
    size: str, seconds: float, num_utterances: int, bf16: bool, tmp_path: Path
) -> None:
    workload = _workload(shipped_config(size), seconds, bf16=bf16)
    predicted = count_activations(workload, [num_utterances])[0].total
    measured = _peak_of_the_allocator(_micro_batch(workload, num_utterances), tmp_path)
    print(f"{size}, {num_utterances} x {seconds:g} s: predicted {predicted:,} bytes, measured {measured:,}")
    assert predicted == pytest.approx(measured, rel=LIMIT)


@pytest.mark.parametrize("size", ["demo", "conformer_large"])
def test_counted_as_tensors_live_under_gradient_checkpointing(size: str) -> None:
    """Not the allocator's count: what then decides, a convolution's own buffer on the CPU, a GPU does not have."""
    config = shipped_config(size)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 128, 256
    workload = _workload(config, gradient_checkpointing=True)
    run = _micro_batch(workload, 2)
    memory = LiveMemory()
    with memory:
        run()
    assert count_activations(workload, [2])[0].total == pytest.approx(memory.peak_bytes, rel=LIMIT)


def test_parts_are_told_apart() -> None:
    """More layers add to the encoder, more channels to the front end, more negatives to the head, and nowhere else."""
    config = shipped_config("demo")

    def count(**changes: Any) -> Activations:
        changed = shipped_config("demo")
        for name, value in changes.items():
            setattr(changed, name, value)
        return count_activations(_workload(changed), [4])[0]

    before, layers, negatives = count(), count(num_hidden_layers=6), count(num_negatives=3200)
    channels = count(conv_dim=(96,) * config.num_feat_extract_layers)
    assert layers.front_end == before.front_end and layers.encoder > 1.8 * before.encoder
    assert channels.front_end > 1.8 * before.front_end and channels.encoder == pytest.approx(before.encoder, rel=0.05)
    assert negatives.loss_head > 3 * before.loss_head and negatives.encoder == pytest.approx(before.encoder, rel=0.05)


def test_checkpointing_and_a_frozen_front_end_save_what_they_should() -> None:
    whole = count_activations(_workload(shipped_config("demo")), [4])[0]
    checkpointed = count_activations(_workload(shipped_config("demo"), gradient_checkpointing=True), [4])[0]
    frozen = count_activations(_workload(shipped_config("demo"), freeze_feature_encoder=True), [4])[0]
    assert checkpointed.total < 0.7 * whole.total
    assert frozen.front_end < 0.4 * whole.front_end and frozen.encoder == pytest.approx(whole.encoder, rel=0.05)


def test_dropout_is_counted_as_a_gpu_keeps_it() -> None:
    """One byte per value, and no (T, T) matrix in attention, which the CPU's kernel forms."""
    config = shipped_config("demo")
    without = count_activations(_workload(config, 8.0, cuda=True), [4])[0].encoder
    config.attention_dropout = 0.1
    assert count_activations(_workload(config, 8.0, cuda=True), [4])[0].encoder == without
    assert count_activations(_workload(config, 8.0), [4])[0].encoder > 1.5 * without
    config.attention_dropout, config.hidden_dropout = 0.0, 0.1
    on_gpu, on_cpu = (count_activations(_workload(config, 8.0, cuda=cuda), [4])[0].encoder for cuda in (True, False))
    num_values = 4 * 399 * config.hidden_size  # of a hidden state
    num_dropouts = 1 + 2 * config.num_hidden_layers
    assert on_cpu - on_gpu == pytest.approx((4 - 1) * num_dropouts * num_values, rel=0.2)


def test_autocast_takes_more_than_a_model_in_bf16() -> None:
    config = shipped_config("demo")
    cast, autocast, fp32 = (
        count_activations(_workload(config, bf16=bf16, casts_model=casts_model, cuda=True), [4])[0].total
        for bf16, casts_model in ((True, True), (True, False), (False, True))
    )
    assert cast < 0.8 * autocast < 0.8 * fp32


@pytest.mark.parametrize("size", [size for size in SIZES if size != "conformer_large"])
def test_every_size_can_be_counted(size: str) -> None:
    workload = _workload(shipped_config(size), 5.0, bf16=True, cuda=True)
    one, two = count_activations(workload, [1, 2])
    assert 0 < one.total < two.total <= 2 * one.total
    numbers = model_numbers(workload)
    assert numbers.frozen == 0 and numbers.trained > numbers.largest > 0


def test_nothing_is_left_behind() -> None:
    """Neither the default type nor the configuration is changed."""
    config = shipped_config("demo")
    before = config.to_dict()
    count_activations(_workload(config, bf16=True), [1])
    assert torch.get_default_dtype() == torch.float32 and config.to_dict() == before
    assert not isinstance(torch.zeros(1), torch._subclasses.FakeTensor)
