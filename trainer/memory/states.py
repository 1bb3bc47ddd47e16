"""What weights, gradients, optimizer and communication take on one card and in host memory, by DeepSpeed configuration.

Sizes follow what DeepSpeed 0.19.8 allocates (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py) and are read from the
configuration file. Widths in bytes per element: w is that of the weights (bf16: 2), g that of accumulated gradients.
AdamW's states are three fp32 values each: the weight it updates and two moments.
"""

import dataclasses
from typing import Any

_FP32 = 4
_STATES = 3 * _FP32
_DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, None: 0}
# deepspeed/runtime/zero/config.py, offload_config.py
_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
_NVME_BUFFERS = 4

# A rank's own share of host memory: Python, torch and CUDA's libraries, and the processes that decode its audio.
HOST_BYTES_PER_RANK = 4 << 30


@dataclasses.dataclass(frozen=True)
class ModelNumbers:
    """Counts of parameters, which decide the size of everything here."""

    trained: int
    frozen: int
    largest: int
    """Elements of the largest trained tensor."""
    hidden_size: int

    @property
    def all(self) -> int:
        return self.trained + self.frozen


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes on one card while forward and backward run, and of one rank on the host."""

    parameters: int
    gradients: int
    optimizer: int
    communication: int
    only_in_step: int
    """What the optimizer's step needs besides, when there are no activations."""
    offloaded: int
    """What takes its place on the host."""
    host: int
    """All that a rank takes there, offloaded states and start-up included."""
    disk: int = 0

    @property
    def card(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.communication


def plain_states(model: ModelNumbers) -> StateBytes:
    """DistributedDataParallel, of one rank too: fp32 weights (bf16 is autocast), and buckets as large as gradients."""
    return StateBytes(
        parameters=_FP32 * model.all,
        gradients=_FP32 * model.trained,
        optimizer=2 * _FP32 * model.trained,
        communication=_FP32 * model.trained,
        only_in_step=0,
        offloaded=0,
        host=_host(model, 0),
    )


def deepspeed_states(model: ModelNumbers, num_ranks: int, ds_config: dict[str, Any], *, bf16: bool) -> StateBytes:
    """ZeRO stage 1, 2 or 3 as `ds_config` sets it up, with two or more micro-batches per update (the larger case)."""
    width = 2 if bf16 else _FP32
    # what an update adds up, in its own type where the file names one
    accumulated = _DTYPE_BYTES.get((ds_config.get("data_types") or {}).get("grad_accum_dtype"), 0) or width
    zero = ds_config["zero_optimization"]
    if zero["stage"] == 3:
        return _stage_3(model, num_ranks, zero, width, accumulated)
    return _stage_1_and_2(model, num_ranks, zero, width, accumulated)


def _stage_1_and_2(
    model: ModelNumbers, num_ranks: int, zero: dict[str, Any], width: int, accumulated: int
) -> StateBytes:
    share = -(-model.trained // num_ranks)  # rounded up, as partitions are
    bucket = _number(zero, "reduce_bucket_size", model.hidden_size)
    # one more of it is flattened while a bucket is reduced, and a tensor's slice becomes fp32
    communication = width * (bucket * (2 if zero.get("overlap_comm") else 1) + min(bucket, model.trained))
    communication += _FP32 * model.largest
    parameters = width * model.all
    kept = accumulated * (share if zero["stage"] == 2 else model.trained)
    if _device(zero, "offload_optimizer") == "none":
        return StateBytes(
            parameters=parameters,
            gradients=kept,
            optimizer=_STATES * share,
            communication=communication,
            only_in_step=_FP32 * share if accumulated != _FP32 else 0,
            offloaded=0,
            host=_host(model, 0),
        )
    # A window's gradients add up on the card where their type is not the weights' (fp32 beside bf16); otherwise on the
    # host. Beside AdamW's states the host holds their fp32 copy for the step and the updated weights on their way back.
    on_card = accumulated != width
    offloaded = (_STATES + _FP32 + width + (0 if on_card else width)) * share
    return StateBytes(
        parameters=parameters,
        gradients=kept if on_card else 0,
        optimizer=0,
        communication=communication + width * model.largest,
        only_in_step=0,
        offloaded=offloaded,
        host=_host(model, offloaded),
    )


def _stage_3(model: ModelNumbers, num_ranks: int, zero: dict[str, Any], width: int, accumulated: int) -> StateBytes:
    share = -(-model.trained // num_ranks)
    weights_share = width * -(-model.all // num_ranks)
    bucket = _number(zero, "reduce_bucket_size", model.hidden_size)
    sub_group = min(_number(zero, "sub_group_size", model.hidden_size), share)
    offloads_weights = _device(zero, "offload_param") != "none"
    optimizer_device = _device(zero, "offload_optimizer")
    parameters = (0 if offloads_weights else weights_share) + width * _gathered(model, num_ranks, zero)
    # the bucket, its flattened copy, and the own part of it as it is accumulated
    communication = width * bucket * (2 if num_ranks > 1 else 1) + accumulated * -(-bucket // num_ranks)
    host = weights_share if offloads_weights else 0
    if optimizer_device == "none":
        return StateBytes(
            parameters=parameters,
            gradients=accumulated * share,
            optimizer=_STATES * share,
            communication=communication,
            only_in_step=_FP32 * sub_group,
            offloaded=host,
            host=_host(model, host),
        )
    host += accumulated * share
    if optimizer_device == "nvme":
        buffers = int((zero.get("offload_optimizer") or {}).get("buffer_count", _NVME_BUFFERS))
        host, disk = host + buffers * _FP32 * sub_group, (_STATES + _FP32) * share
    else:
        host, disk = host + (_STATES + _FP32) * share, 0
    return StateBytes(
        parameters=parameters,
        gradients=0,
        optimizer=0,
        communication=communication,
        only_in_step=0,
        offloaded=host,
        host=_host(model, host),
        disk=disk,
    )


def _gathered(model: ModelNumbers, num_ranks: int, zero: dict[str, Any]) -> int:
    """Elements of whole weights that ZeRO-3 holds at the start of backward.

    It keeps after forward what is used again within `stage3_max_reuse_distance` elements, on the way to the loss and
    back, and fetches ahead. One rank holds all weights anyway, unless they are offloaded.
    """
    if num_ranks == 1 and _device(zero, "offload_param") == "none":
        return 0
    kept = min(
        _number(zero, "stage3_max_reuse_distance", model.hidden_size) // 2,
        _number(zero, "stage3_max_live_parameters", model.hidden_size),
    )
    ahead = _number(zero, "stage3_prefetch_bucket_size", model.hidden_size)
    return min(model.all, kept + ahead + model.largest)


def _host(model: ModelNumbers, offloaded: int) -> int:
    """Host memory of one rank: the most of start-up, when it makes the model in fp32, and of training."""
    return HOST_BYTES_PER_RANK + max(_FP32 * model.all, offloaded)


def _device(zero: dict[str, Any], section: str) -> str:
    return str((zero.get(section) or {}).get("device") or "none")


def _number(zero: dict[str, Any], key: str, hidden_size: int) -> int:
    """The file's value; accelerate's where it says "auto" (accelerate/accelerator.py); else DeepSpeed's default."""
    value = zero.get(key, _DEFAULTS[key])
    if value != "auto":
        return int(value)
    return {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
    }[key]
