"""wav2vec 2.0 for pre-training: transformers' models and parameter names, our forward pass and loss head."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForPreTraining,
    Wav2Vec2ForPreTraining,
)

from trainer.model.batch_norm import BatchNorm, batch_norms, recomputing
from trainer.model.group_norm import GroupNorm
from trainer.model.objective import contrastive_sums, perplexity, quantize, usage_over_ranks
from trainer.model.sizes import ModelConfig


class LossTerms(NamedTuple):
    """Sums over the masked frames of one micro-batch; scalar fp32 tensors. Only `loss` carries a graph.

    A tuple, because DeepSpeed hooks tensors in tuples but not in dataclasses; one differentiable output, because
    DeepSpeed 0.18.3 to 0.19.6 scaled the gradient of each of them.
    """

    loss: Tensor
    contrastive_loss: Tensor
    diversity_loss: Tensor
    feature_penalty: Tensor
    num_correct: Tensor
    num_targets: Tensor
    code_perplexity: Tensor
    prob_perplexity: Tensor


class PretrainingModel(PreTrainedModel):
    """A forward made for training over the parameters, under their names, of one of transformers' two `ForPreTraining`.

    `feature_penalty_weight` and `feature_grad_mult` are fairseq's `loss_weights[1]` and `feature_grad_mult`, which
    transformers leaves out. With `global_diversity` the diversity loss and both perplexities of a training micro-batch
    are those of all ranks together; validation takes them per micro-batch, so it does not depend on the world size.
    The methods below take what `trainer.data.collate.Batch` holds.
    """

    config: ModelConfig
    quantizer: Any
    project_hid: nn.Linear
    project_q: nn.Linear
    dropout_features: nn.Dropout

    def __init__(
        self,
        config: ModelConfig,
        *,
        feature_penalty_weight: float = 0.0,
        feature_grad_mult: float = 1.0,
        global_diversity: bool = True,
    ) -> None:
        super().__init__(config)
        self.feature_penalty_weight = feature_penalty_weight
        self.feature_grad_mult = feature_grad_mult
        self.global_diversity = global_diversity
        self.dropped_layers: frozenset[int] = frozenset()
        self.valid_frames: Tensor | None = None
        # transformers draws LayerDrop from each rank's own generator and, under ZeRO-3, keeps every layer. Its draw is
        # turned off in a copy of the config (the saved one keeps its value); ours comes in as `dropped_layers`.
        encoder = self.backbone.encoder
        encoder.config = copy.copy(config)
        encoder.config.layerdrop = 0.0
        self.group_norms: list[GroupNorm] = []  # a list, so the state dict has it once
        if config.feat_extract_norm == "group":
            first = self.backbone.feature_extractor.conv_layers[0]
            first.layer_norm = GroupNorm(first.layer_norm.num_groups, first.layer_norm.num_channels)
            self.group_norms.append(first.layer_norm)
        for index, layer in enumerate(encoder.layers):
            layer.register_forward_hook(self._layer_drop_hook(index))

    @property
    def backbone(self) -> Any:
        """transformers' `Wav2Vec2Model` or `Wav2Vec2ConformerModel`."""
        return self.base_model

    def freeze_feature_encoder(self) -> None:
        """Leave the convolutional front end as it is: no gradients, so no optimizer, and no penalty in the loss."""
        self.backbone.freeze_feature_encoder()
        self.feature_penalty_weight = 0.0

    def checkpoint_activations(self) -> None:
        """Recompute activations in backward; a conformer's running statistics count each micro-batch once all the same.

        Non-reentrant: the reentrant kind needs inputs with gradients and does not go with ZeRO's hooks.
        """
        how: dict[str, Any] = {"use_reentrant": False}
        if norms := batch_norms(self):
            how["context_fn"] = lambda: (contextlib.nullcontext(), recomputing(norms))
        # its name since transformers 5.23, where the old one warns
        if hasattr(self, "activation_checkpointing_enable"):
            self.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        else:
            cast(Any, self).gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)

    def _layer_drop_hook(self, index: int) -> Any:
        """Run-and-discard LayerDrop: a dropped layer still runs, so all ranks gather and reduce the same parameters."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            if index not in self.dropped_layers:
                return None
            is_tuple = isinstance(output, tuple)
            ran = output[0] if is_tuple else output
            keep = torch.zeros((), dtype=torch.bool, device=ran.device)
            skipped = torch.where(keep, ran, args[0])  # its parameters get a gradient of zeros, not None
            return (skipped, *output[1:]) if is_tuple else skipped

        return hook

    def forward(
        self,
        input_values: Tensor,
        mask: Tensor,
        target_frames: Tensor,
        target_valid: Tensor,
        negatives: Tensor,
        gumbel_temperature: float = 1.0,
        dropped_layers: tuple[int, ...] = (),
        num_samples: Tensor | None = None,
    ) -> LossTerms:
        """Loss sums of one micro-batch.

        `input_values` `[B, S]` samples; `mask` `[B, T]` bool; `target_frames` `[B, M]` positions of masked frames;
        `target_valid` `[B, M]` bool; `negatives` `[B, M, K]` indices into M. `gumbel_temperature` is read in training
        mode only; in evaluation the most likely codewords are taken. `dropped_layers` are those LayerDrop leaves out.
        `num_samples` `[B]` int64, on the CPU, says where padding begins; with it the sums are those of the rows alone
        (but for the diversity loss, a statistic of the batch).
        """
        self.dropped_layers = frozenset(dropped_layers)
        self.valid_frames = None if num_samples is None else self._find_valid_frames(num_samples, mask)  # [B, T]
        features, penalty = self._features(input_values, num_samples)  # [B, T, C]
        hidden_states, normed = self.backbone.feature_projection(features)  # [B, T, H], [B, T, C]
        hidden_states = torch.where(
            mask.unsqueeze(-1), self.backbone.masked_spec_embed.to(hidden_states.dtype), hidden_states
        )
        encoded = self.backbone.encoder(hidden_states, attention_mask=self.valid_frames).last_hidden_state  # [B, T, H]

        predictions = self.project_hid(_take_frames(encoded, target_frames))  # [B, M, D]
        candidates = self.dropout_features(_take_frames(normed, target_frames))  # [B, M, C]
        return self._loss_terms(
            predictions, candidates, target_valid, negatives, penalty, gumbel_temperature if self.training else None
        )

    def _find_valid_frames(self, num_samples: Tensor, mask: Tensor) -> Tensor:
        """False where a frame is padding, `[B, T]` as `mask`: it sees at least one sample past the end of its row."""
        lengths = num_samples
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            lengths = _conv_length(lengths, kernel, stride)
        return torch.arange(mask.shape[1], device=mask.device) < lengths.to(mask.device).unsqueeze(1)

    def _features(self, input_values: Tensor, num_samples: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolutional features `[B, T, C]` and their mean squares `[B]` (the penalty, fairseq's `features_pen`)."""
        for norm in self.group_norms:
            kernel, stride = self.config.conv_kernel[0], self.config.conv_stride[0]
            norm.num_frames = None if num_samples is None else _conv_length(num_samples, kernel, stride).tolist()
        # the waveform stays fp32 up to here: DeepSpeed casts the model to bf16 but not what goes into it
        dtype = next(self.backbone.feature_extractor.parameters()).dtype
        features = self.backbone.feature_extractor(input_values.to(dtype))  # [B, C, T]
        if self.feature_grad_mult != 1.0 and features.requires_grad:
            features.register_hook(lambda gradient: gradient * self.feature_grad_mult)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.feature_penalty_weight > 0):
            squares = features.float().square()
            if self.valid_frames is None:
                penalty = squares.mean(dim=(1, 2))  # [B]
            else:
                penalty = (squares.mean(dim=1) * self.valid_frames).sum(dim=1) / self.valid_frames.sum(dim=1)  # [B]
        return features.transpose(1, 2), penalty

    def _loss_terms(
        self,
        predictions: Tensor,
        candidates: Tensor,
        valid: Tensor,
        negatives: Tensor,
        penalty: Tensor,
        gumbel_temperature: float | None,
    ) -> LossTerms:
        """Quantize the candidates and sum the three losses; each mean is multiplied by the count, as fairseq does.

        The penalty of each utterance counts as often as its targets, so it does not depend on who shares its batch;
        fairseq takes the mean over the batch, the same for equal numbers of targets.
        """
        config = self.config
        batch_size, num_frames, _ = candidates.shape
        num_groups, num_vars = config.num_codevector_groups, config.num_codevectors_per_group
        quantized = quantize(
            self.quantizer.weight_proj(candidates).view(batch_size * num_frames, num_groups, num_vars),
            self.quantizer.codevectors.view(num_groups, num_vars, -1),
            valid.reshape(-1),
            gumbel_temperature,
        )
        targets = self.project_q(quantized.vectors.to(self.project_q.weight.dtype)).view(batch_size, num_frames, -1)
        contrastive = contrastive_sums(
            predictions,
            targets,
            quantized.codes.view(batch_size, num_frames),
            negatives,
            valid,
            config.contrastive_logits_temperature,
        )
        num_targets = valid.sum().float()
        usage, num_frames_used = quantized.usage, num_targets
        if self.global_diversity and self.training and _num_ranks() > 1:
            usage, num_frames_used = usage_over_ranks(usage, num_targets)
        prob_perplexity, code_perplexity = perplexity(usage, num_frames_used)
        num_codewords = num_groups * num_vars
        diversity = (num_codewords - prob_perplexity) / num_codewords * num_targets
        feature_penalty = (penalty * valid.sum(dim=1)).sum()
        loss = contrastive.loss + config.diversity_loss_weight * diversity
        if self.feature_penalty_weight:
            loss = loss + self.feature_penalty_weight * feature_penalty
        return LossTerms(
            loss=loss,
            contrastive_loss=contrastive.loss.detach(),
            diversity_loss=diversity.detach(),
            feature_penalty=feature_penalty.detach(),
            num_correct=contrastive.num_correct,
            num_targets=num_targets,
            code_perplexity=(code_perplexity * num_targets).detach(),
            prob_perplexity=(prob_perplexity * num_targets).detach(),
        )


class Wav2Vec2PretrainingModel(PretrainingModel, Wav2Vec2ForPreTraining):
    """`Wav2Vec2ForPreTraining` as a `PretrainingModel`."""

    config: Wav2Vec2Config


class ConformerPretrainingModel(PretrainingModel, Wav2Vec2ConformerForPreTraining):
    """`Wav2Vec2ConformerForPreTraining` as a `PretrainingModel`.

    The convolution of each conformer layer has a batch norm (Gulati et al. 2020, section 2.2), as fairseq's has. While
    training it takes mean and variance over one micro-batch of one rank, so unlike those of the other family, a
    conformer's losses and gradients depend on how a window is split over ranks and micro-batches. Each rank keeps
    running statistics of its own (`batch_norm.running_statistics`); validation and the saved model use them.
    """

    config: Wav2Vec2ConformerConfig

    def __init__(self, config: Wav2Vec2ConformerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        for layer in self.backbone.encoder.layers:
            layer.conv_module.batch_norm = BatchNorm(config.hidden_size)
            layer.conv_module.depthwise_conv.register_forward_pre_hook(self._padding_hook(layer.conv_module.batch_norm))

    def _padding_hook(self, norm: BatchNorm) -> Any:
        """What follows in a layer's convolutions takes padding for the silence past the end that it is when alone."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            norm.valid = self.valid_frames
            if self.valid_frames is None:
                return None
            return (args[0].masked_fill(~self.valid_frames.unsqueeze(1), 0),)  # [B, C, T]

        return hook

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ConformerPretrainingModel":
        """Move and cast as usual, but leave buffers in fp32.

        DeepSpeed casts them in ZeRO-1 and 2 and not in 3. In bfloat16 running statistics stop moving some percent away
        from their aim, and rotary positions above 256 are no longer told apart.
        """
        before = dict(self.named_buffers())
        cast(Any, super())._apply(fn, recurse)
        for name, buffer in before.items():
            owner, _, attribute = name.rpartition(".")
            now = self.get_buffer(name)
            if now.dtype != buffer.dtype:
                setattr(self.get_submodule(owner), attribute, buffer.to(now.device))
        return self


def model_class(config: ModelConfig) -> type[PretrainingModel]:
    """The class of the configuration's family."""
    return ConformerPretrainingModel if isinstance(config, Wav2Vec2ConformerConfig) else Wav2Vec2PretrainingModel


def freeze_unused(model: PretrainingModel) -> None:
    """Ask for no gradient of what transformers makes and saves and never uses: a conformer's positional convolution.

    It would get none, which DistributedDataParallel waits for, and ZeRO would decay it.
    """
    if isinstance(model, ConformerPretrainingModel):
        model.backbone.encoder.pos_conv_embed.requires_grad_(False)


def _num_ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _conv_length(lengths: Tensor, kernel: int, stride: int) -> Tensor:
    """Frames that an unpadded convolution makes of each length."""
    return torch.div(lengths - kernel, stride, rounding_mode="floor") + 1


def _take_frames(sequence: Tensor, frames: Tensor) -> Tensor:
    """Rows of `sequence` `[B, T, C]` at `frames` `[B, M]` -> `[B, M, C]`."""
    return sequence.gather(1, frames.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))


@torch.no_grad()
def initialise_positional_conv(model: PretrainingModel) -> None:
    """Draw the positional convolution from N(0, 4 / (kernel x channels)) as fairseq does; its bias is zero.

    transformers writes these values into a temporary of the weight-norm parametrization, where they are lost, so the
    layer keeps PyTorch's default. Assigning to the parametrized weight stores direction and magnitude instead.
    """
    conv = model.backbone.encoder.pos_conv_embed.conv
    std = math.sqrt(4.0 / (conv.kernel_size[0] * conv.in_channels))
    conv.weight = torch.randn_like(conv.weight) * std
    conv.bias.zero_()


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    feature_penalty_weight: float = 0.0,
    feature_grad_mult: float = 1.0,
    global_diversity: bool = True,
) -> PretrainingModel:
    """A freshly initialised model on the CPU in fp32; the same on every rank for the same seed.

    Call it before an `Accelerator` exists: `zero.Init` cannot build Wav2Vec2, DeepSpeed partitions it afterwards.
    """
    torch.manual_seed(seed)
    model = model_class(config)(
        config,
        feature_penalty_weight=feature_penalty_weight,
        feature_grad_mult=feature_grad_mult,
        global_diversity=global_diversity,
    )
    initialise_positional_conv(model)
    freeze_unused(model)
    return model
