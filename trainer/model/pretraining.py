"""wav2vec 2.0 for pre-training: transformers' model and parameter names, our forward pass and loss head."""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

from trainer.model.objective import contrastive_sums, quantize


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


class PretrainingModel(Wav2Vec2ForPreTraining):
    """`Wav2Vec2ForPreTraining` with the same parameters under the same names and a forward made for training.

    `feature_penalty_weight` and `feature_grad_mult` are fairseq's `loss_weights[1]` and `feature_grad_mult`, which
    transformers leaves out. The methods below take what `trainer.data.collate.Batch` holds.
    """

    def __init__(
        self, config: Wav2Vec2Config, *, feature_penalty_weight: float = 0.0, feature_grad_mult: float = 1.0
    ) -> None:
        super().__init__(config)
        self.feature_penalty_weight = feature_penalty_weight
        self.feature_grad_mult = feature_grad_mult
        self.dropped_layers: frozenset[int] = frozenset()
        # transformers draws LayerDrop from each rank's own generator and, under ZeRO-3, keeps every layer. Its draw is
        # turned off in a copy of the config (the saved one keeps its value); ours comes in as `dropped_layers`.
        self.wav2vec2.encoder.config = copy.copy(config)
        self.wav2vec2.encoder.config.layerdrop = 0.0
        for index, layer in enumerate(self.wav2vec2.encoder.layers):
            layer.register_forward_hook(self._layer_drop_hook(index))

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
    ) -> LossTerms:
        """Loss sums of one micro-batch.

        `input_values` `[B, S]` samples; `mask` `[B, T]` bool; `target_frames` `[B, M]` positions of masked frames;
        `target_valid` `[B, M]` bool; `negatives` `[B, M, K]` indices into M. `gumbel_temperature` is read in training
        mode only; in evaluation the most likely codewords are taken. `dropped_layers` are those LayerDrop leaves out.
        """
        self.dropped_layers = frozenset(dropped_layers)
        features, penalty = self._features(input_values)  # [B, T, C]
        hidden_states, normed = self.wav2vec2.feature_projection(features)  # [B, T, H], [B, T, C]
        hidden_states = torch.where(
            mask.unsqueeze(-1), self.wav2vec2.masked_spec_embed.to(hidden_states.dtype), hidden_states
        )
        encoded = self.wav2vec2.encoder(hidden_states).last_hidden_state  # [B, T, H]

        predictions = self.project_hid(_take_frames(encoded, target_frames))  # [B, M, D]
        candidates = self.dropout_features(_take_frames(normed, target_frames))  # [B, M, C]
        return self._loss_terms(
            predictions, candidates, target_valid, negatives, penalty, gumbel_temperature if self.training else None
        )

    def _features(self, input_values: Tensor) -> tuple[Tensor, Tensor]:
        """Convolutional features `[B, T, C]` and their mean square (the feature penalty, fairseq's `features_pen`)."""
        # the waveform stays fp32 up to here: DeepSpeed casts the model to bf16 but not what goes into it
        dtype = next(self.wav2vec2.feature_extractor.parameters()).dtype
        features = self.wav2vec2.feature_extractor(input_values.to(dtype))  # [B, C, T]
        if self.feature_grad_mult != 1.0 and features.requires_grad:
            features.register_hook(lambda gradient: gradient * self.feature_grad_mult)
        return features.transpose(1, 2), features.float().pow(2).mean()

    def _loss_terms(
        self,
        predictions: Tensor,
        candidates: Tensor,
        valid: Tensor,
        negatives: Tensor,
        penalty: Tensor,
        gumbel_temperature: float | None,
    ) -> LossTerms:
        """Quantize the candidates and sum the three losses; each mean is multiplied by the count, as fairseq does."""
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
        num_codewords = num_groups * num_vars
        diversity = (num_codewords - quantized.prob_perplexity) / num_codewords * num_targets
        feature_penalty = penalty * num_targets
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
            code_perplexity=(quantized.code_perplexity * num_targets).detach(),
            prob_perplexity=(quantized.prob_perplexity * num_targets).detach(),
        )


def _take_frames(sequence: Tensor, frames: Tensor) -> Tensor:
    """Rows of `sequence` `[B, T, C]` at `frames` `[B, M]` -> `[B, M, C]`."""
    return sequence.gather(1, frames.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))


@torch.no_grad()
def initialise_positional_conv(model: Wav2Vec2ForPreTraining) -> None:
    """Draw the positional convolution from N(0, 4 / (kernel x channels)) as fairseq does; its bias is zero.

    transformers writes these values into a temporary of the weight-norm parametrization, where they are lost, so the
    layer keeps PyTorch's default. Assigning to the parametrized weight stores direction and magnitude instead.
    """
    conv = model.wav2vec2.encoder.pos_conv_embed.conv
    assert conv.bias is not None
    std = math.sqrt(4.0 / (conv.kernel_size[0] * conv.in_channels))
    conv.weight = torch.randn_like(conv.weight) * std
    conv.bias.zero_()


def build_model(
    config: Wav2Vec2Config, *, seed: int, feature_penalty_weight: float, feature_grad_mult: float
) -> PretrainingModel:
    """A freshly initialised model on the CPU in fp32; the same on every rank for the same seed.

    Call it before an `Accelerator` exists: `zero.Init` cannot build Wav2Vec2, DeepSpeed partitions it afterwards.
    """
    torch.manual_seed(seed)
    model = PretrainingModel(config, feature_penalty_weight=feature_penalty_weight, feature_grad_mult=feature_grad_mult)
    initialise_positional_conv(model)
    return model
