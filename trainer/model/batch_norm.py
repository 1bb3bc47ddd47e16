"""The batch norm of a conformer's convolutions: in fp32, proof against one bad batch and against recomputation."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn, where, zeros_like


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` in fp32, whatever type its input and its weights, cast by DeepSpeed, have.

    PyTorch takes fp32 statistics only together with fp32 weights. A batch that is not finite leaves no trace in the
    running statistics: its update is skipped, and they would never recover.
    """

    valid: Tensor | None = None
    """False for padded frames, `[B, T]`, which do not count in training; None where nothing is padded."""
    records = True  # off while activations are recomputed, which would count a batch twice

    def forward(self, input: Tensor) -> Tensor:
        """`input` `[B, C, T]`; in training padded frames become 0."""
        if self.valid is None or not self.training:
            return self._normalise(input)
        frames = input.transpose(1, 2)  # [B, T, C]
        normalised = zeros_like(frames)
        normalised[self.valid] = self._normalise(frames[self.valid])  # [N, C]
        return normalised.transpose(1, 2)

    def _normalise(self, input: Tensor) -> Tensor:
        batch_norm = nn.functional.batch_norm
        weight, bias = self.weight.float(), self.bias.float()
        mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        if not self.training:
            return batch_norm(input, mean, variance, weight, bias, False, 0.0, self.eps)
        new_mean, new_variance = mean.clone(), variance.clone()
        output = batch_norm(input, new_mean, new_variance, weight, bias, True, cast(float, self.momentum), self.eps)
        if self.records:
            mean.copy_(where(new_mean.isfinite(), new_mean, mean))
            variance.copy_(where(new_variance.isfinite(), new_variance, variance))
            cast(Tensor, self.num_batches_tracked).add_(1)
        return output


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """All of a model's; none in the wav2vec2 family."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances: what ranks have to average before validating or saving."""
    return [cast(Tensor, value) for norm in batch_norms(model) for value in (norm.running_mean, norm.running_var)]


@contextlib.contextmanager
def recomputing(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Run over batches that were recorded before."""
    for norm in norms:
        norm.records = False
    try:
        yield
    finally:
        for norm in norms:
            norm.records = True
