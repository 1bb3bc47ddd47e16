"""The wav2vec 2.0 objective as sums over masked frames (Baevski et al. 2020, equations 2 to 4).

Nothing here divides by a count: the caller scales one global sum once, so the gradient does not depend on how a
batch was split. Frames that are not masked never enter: predictions and targets arrive as `[B, M, ...]`, where M is
the largest number of masked frames in a row and `valid` `[B, M]` tells real positions from padding.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class ContrastiveSums(NamedTuple):
    """Sums over the masked frames of one micro-batch, each a scalar fp32 tensor."""

    loss: Tensor
    num_correct: Tensor


class Quantized(NamedTuple):
    """What the product quantizer made of N frames."""

    vectors: Tensor  # [N, G x d], the chosen codewords, straight-through
    codes: Tensor  # [N], one integer per combination of chosen codewords
    usage: Tensor  # [2, G, V], sums over valid frames: of the softmax (differentiable) and of the most likely codeword


def quantize(logits: Tensor, codebook: Tensor, valid: Tensor, temperature: float | None) -> Quantized:
    """Product quantization of N frames by (Gumbel) softmax over G groups of V codewords (section 2, equation 1).

    `logits` `[N, G, V]`, `codebook` `[G, V, d]`, `valid` `[N]`. With a `temperature` codewords are drawn by a
    straight-through Gumbel softmax; with None the most likely one is taken. The codewords are gathered by one grouped
    matmul, so no tensor of N x G x V x d elements exists (transformers forms it).
    """
    logits = logits.float()  # [N, G, V]
    num_frames, num_groups, num_vars = logits.shape
    best = functional.one_hot(logits.argmax(dim=-1), num_vars).to(logits.dtype)
    chosen = best if temperature is None else functional.gumbel_softmax(logits, tau=temperature, hard=True)
    vectors = torch.einsum("ngv,gvd->ngd", chosen.to(codebook.dtype), codebook)  # [N, G, d]
    powers = num_vars ** torch.arange(num_groups, device=logits.device)  # [G]
    weights = valid.to(logits.dtype)[:, None, None]  # [N, 1, 1]
    # sum() adds pairwise; as a matmul this was wrong in the fourth digit for 20,000 frames
    usage = torch.stack([(logits.softmax(dim=-1) * weights).sum(dim=0), (best * weights).sum(dim=0)])
    return Quantized(
        vectors=vectors.reshape(num_frames, -1),
        codes=(chosen.detach().argmax(dim=-1) * powers).sum(dim=-1),
        usage=usage,
    )


def perplexity(usage: Tensor, num_frames: Tensor) -> Tensor:
    """Perplexity of the mean use of codewords, summed over groups (equation 4 uses its entropy).

    `usage` `[..., G, V]` holds sums over `num_frames` (scalar); the result `[...]` lies between G (collapse) and G x V
    (uniform use).
    """
    mean = usage / num_frames.clamp(min=1)  # [..., G, V]
    # the clamp changes no value (0 x log is 0 either way) but keeps the gradient of a codeword nobody chose finite
    logarithm = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return torch.exp(-(mean * logarithm).sum(dim=-1)).sum(dim=-1)


def usage_over_ranks(usage: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
    """`usage` and `num_frames` summed over all ranks by one all-reduce; the gradient needs none.

    Let S_r be the usage and n_r the frames of rank r, S and N their sums, and D the diversity loss of S / N. All ranks
    together add L = sum_r n_r D(S / N) = N D(S / N) to the objective, so dL/dS_r = D'(S / N): the same on every rank.
    Rank r differentiates its own term n_r D(S / N) alone and would get (n_r / N) D'(S / N); the factor N / n_r put on
    its gradient here makes up for the terms of the others. Every rank must call it.
    """
    told = torch.cat([usage.detach().flatten(), num_frames.detach().view(1)])
    torch.distributed.all_reduce(told)
    total, total_frames = told[:-1].view_as(usage), told[-1]
    own_gradient = (usage - usage.detach()) * (total_frames / num_frames.clamp(min=1))  # its value is 0
    return total + own_gradient, total_frames


def contrastive_sums(
    predictions: Tensor, targets: Tensor, codes: Tensor, negatives: Tensor, valid: Tensor, temperature: float
) -> ContrastiveSums:
    """Sum of InfoNCE losses over masked frames and the number ranked right (section 3.2, equation 3).

    `predictions` and `targets` `[B, M, D]`; `codes` `[B, M]` identify equal targets; `negatives` `[B, M, K]` index
    the M axis of the same row; `valid` `[B, M]`. All similarities of a row are one (M, M) matmul in fp32, of which
    each frame's K sampled columns are gathered, so no (K, B, M, D) tensor exists. A negative that is the positive's
    own codeword is left out, as fairseq and transformers do. A frame counts as correct when its positive scores
    highest and not also lowest (fairseq's rule: a collapsed codebook scores nothing).
    """
    with torch.autocast(device_type=predictions.device.type, enabled=False):
        predictions = functional.normalize(predictions.float(), dim=-1)
        targets = functional.normalize(targets.float(), dim=-1)
        similarities = torch.matmul(predictions, targets.transpose(1, 2)) / temperature  # [B, M, M]
    positive = similarities.diagonal(dim1=1, dim2=2).unsqueeze(-1)  # [B, M, 1]
    # batches carry int16, transposed: read in order, the gather is a quarter faster
    negatives = negatives.to(torch.int64, memory_format=torch.contiguous_format)
    distractors = similarities.gather(2, negatives)  # [B, M, K]
    batch_size, num_frames, num_negatives = negatives.shape
    negative_codes = codes.gather(1, negatives.reshape(batch_size, -1)).view(batch_size, num_frames, num_negatives)
    distractors = distractors.masked_fill(negative_codes == codes.unsqueeze(-1), float("-inf"))

    logits = torch.cat([positive, distractors], dim=-1)  # [B, M, 1 + K]
    losses = logits.logsumexp(dim=-1) - positive.squeeze(-1)  # [B, M]
    with torch.no_grad():
        highest = positive.squeeze(-1) >= logits.amax(dim=-1)
        lowest = positive.squeeze(-1) <= logits.amin(dim=-1)
        correct = highest & ~lowest & ~torch.isneginf(distractors).all(dim=-1) & valid
    return ContrastiveSums(
        loss=torch.where(valid, losses, torch.zeros_like(losses)).sum(),
        num_correct=correct.sum().float(),
    )
