"""Activation memory of one micro-batch, counted by running our model, forward and backward, on fake tensors.

Fake tensors have shapes, types and storages but no contents: no weights are allocated, no card is needed, and what is
kept for backward is what PyTorch keeps. Only what CUDA's kernels keep otherwise than the CPU's is stood in for, below.
"""

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trainer.data.audio import SAMPLE_RATE
from trainer.data.frames import FrameGeometry
from trainer.memory.states import ModelNumbers
from trainer.model.pretraining import PretrainingModel, build_model
from trainer.model.sizes import ModelConfig

PARTS = ("front end", "encoder", "loss head")

# A batch has room for the row with the most masked frames, which has a little more of them than is expected of a row.
_LONGEST_ROW = 1.05


@dataclasses.dataclass(frozen=True)
class Workload:
    """What decides the activations of an utterance, beside its length."""

    config: ModelConfig
    utterance_seconds: float
    gradient_checkpointing: bool
    bf16: bool
    casts_model: bool
    """True as under DeepSpeed: the model itself is bf16. False: fp32 weights under autocast (plain PyTorch)."""
    cuda: bool = True
    """Count what CUDA's kernels keep; False: the CPU's."""
    freeze_feature_encoder: bool = False
    feature_penalty_weight: float = 0.0
    feature_grad_mult: float = 1.0


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes at the moment of the peak, by the part of the model that made them; parameters' gradients are not in it."""

    front_end: int
    encoder: int
    loss_head: int

    @property
    def total(self) -> int:
        return self.front_end + self.encoder + self.loss_head


def count_activations(workload: Workload, num_utterances: Sequence[int]) -> list[Activations]:
    """Peak of one micro-batch for each number of utterances, in their order."""
    with FakeTensorMode(), _default_dtype(torch.bfloat16 if workload.bf16 and workload.casts_model else torch.float32):
        model = _fake_model(workload)
        return [_count(workload, model, number) for number in num_utterances]


def model_numbers(workload: Workload) -> ModelNumbers:
    """Counts of the model's parameters."""
    with FakeTensorMode():
        model = _fake_model(workload)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return ModelNumbers(
        trained=sum(trained),
        frozen=sum(parameter.numel() for parameter in model.parameters()) - sum(trained),
        largest=max(trained),
        hidden_size=workload.config.hidden_size,
    )


def _fake_model(workload: Workload) -> PretrainingModel:
    """The model as it trains, made in its type: one of fake tensors cannot be cast afterwards."""
    model = build_model(
        copy.deepcopy(workload.config),
        seed=0,
        feature_penalty_weight=workload.feature_penalty_weight,
        feature_grad_mult=workload.feature_grad_mult,
    )
    # transformers makes it fp32 whatever the default
    model.quantizer.codevectors = nn.Parameter(model.quantizer.codevectors.detach().to(torch.get_default_dtype()))
    if workload.freeze_feature_encoder:
        model.freeze_feature_encoder()
    if workload.gradient_checkpointing:
        model.checkpoint_activations()
    for parameter in model.parameters():
        if parameter.requires_grad:  # they are handed on as soon as they exist, and counted elsewhere
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    model.train()
    # asked for LayerDrop alone, which is ours: transformers' own branches on a random number, and there are no numbers
    model.backbone.encoder.training = False
    return model


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _count(workload: Workload, model: PretrainingModel, num_utterances: int) -> Activations:
    counter = _Counter(_storages([*model.parameters(), *model.buffers()]))
    cast = torch.autocast("cpu", torch.bfloat16, enabled=workload.bf16 and not workload.casts_model)
    kernels = _AsOnCuda() if workload.cuda else contextlib.nullcontext()
    with _labels(model, counter), counter, kernels:
        batch = _batch(workload, num_utterances)
        with cast:
            terms = model(**batch)
        # what `backward` calls; that itself is a function which suspends `kernels`, and checkpoints run layers again
        _engine_run_backward(
            (terms.loss,),
            (torch.ones_like(terms.loss),),
            False,
            False,
            (),
            allow_unreachable=True,
            accumulate_grad=True,
        )
        del terms, batch
    return Activations(*(counter.at_peak[part] for part in PARTS))


def _batch(workload: Workload, num_utterances: int) -> dict[str, Any]:
    """Tensors of a micro-batch as the loop passes them, of utterances of full length."""
    config = workload.config
    num_samples = round(workload.utterance_seconds * SAMPLE_RATE)
    geometry = FrameGeometry(tuple(config.conv_kernel), tuple(config.conv_stride))
    num_frames = geometry.num_frames(num_samples)
    # spans of `length` frames, p starting at each frame, leave a frame alone with (1 - p)^length
    share = 1 - (1 - config.mask_time_prob / config.mask_time_length) ** config.mask_time_length
    num_targets = max(2, min(num_frames, round(num_frames * share * _LONGEST_ROW)))
    return {
        "input_values": torch.empty(num_utterances, num_samples, dtype=torch.float32),
        "mask": torch.empty(num_utterances, num_frames, dtype=torch.bool),
        "target_frames": torch.empty(num_utterances, num_targets, dtype=torch.int64),
        "target_valid": torch.empty(num_utterances, num_targets, dtype=torch.bool),
        "negatives": torch.empty(num_utterances, config.num_negatives, num_targets, dtype=torch.int16).transpose(1, 2),
    }


class _Counter(TorchDispatchMode):
    """Adds up the storages that operations make, each from its birth to its end, under the label of the moment.

    Those of `weights` count nothing, nor do views of them.
    """

    def __init__(self, weights: list[torch.UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = PARTS[0]
        self.live = dict.fromkeys(PARTS, 0)
        self.at_peak = dict(self.live)
        # by address, which is unique as long as the storage lives; the reference calls back when it is freed
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for storage in weights:
            self._watch(storage, num_bytes=0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._watch(storage, num_bytes=storage.nbytes())
        return result

    def _watch(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        address = storage._cdata
        if address in self._watched:
            return
        self._watched[address] = weakref.ref(storage, partial(self._forget, address, self.part, num_bytes))
        self.live[self.part] += num_bytes
        if sum(self.live.values()) > sum(self.at_peak.values()):
            self.at_peak = dict(self.live)

    def _forget(self, address: int, part: str, num_bytes: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        del self._watched[address]
        self.live[part] -= num_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _labels(model: PretrainingModel, counter: _Counter) -> Iterator[None]:
    """Let the counter know which part of the model runs, forward and backward."""

    def switch_to(part: str) -> Callable[[Any], None]:
        return lambda _: setattr(counter, "part", part)

    def before_encoder(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].register_hook(switch_to("front end"))
        counter.part = "encoder"

    def after_encoder(_: nn.Module, __: Any, output: Any) -> None:
        output.last_hidden_state.register_hook(switch_to("encoder"))
        counter.part = "loss head"

    encoder = model.backbone.encoder
    hooks = [encoder.register_forward_pre_hook(before_encoder), encoder.register_forward_hook(after_encoder)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _AsOnCuda(TorchFunctionMode):
    """Has CPU operations keep for backward what CUDA's keep.

    - Dropout keeps a mask of one byte per value; the CPU's keeps the factors.
    - Attention with dropout runs in the same fused kernel as without and keeps no (T, T) matrix.
    - Under autocast both norms compute in fp32, which the CPU's list does not ask for.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        elif func in (functional.layer_norm, functional.group_norm) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)

    @staticmethod
    def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
