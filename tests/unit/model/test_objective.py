"""The loss head: values against a plain reading of the equations, and what it must never form."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.model.objective import contrastive_sums, perplexity, quantize, usage_over_ranks


def _inputs(batch: int = 3, frames: int = 7, dim: int = 5, num_negatives: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "predictions": torch.randn(batch, frames, dim, generator=generator, requires_grad=True),
        "targets": torch.randn(batch, frames, dim, generator=generator, requires_grad=True),
        "codes": torch.randint(0, 4, (batch, frames), generator=generator),
        "negatives": torch.randint(0, frames, (batch, frames, num_negatives), generator=generator),
        "valid": torch.rand(batch, frames, generator=generator) > 0.3,
        "temperature": 0.1,
    }


def _by_loops(
    predictions: Tensor, targets: Tensor, codes: Tensor, negatives: Tensor, valid: Tensor, temperature: float
) -> tuple[Tensor, int]:
    """Equation 3 read frame by frame."""
    total, correct = torch.zeros(()), 0
    for row in range(len(predictions)):
        for frame in torch.nonzero(valid[row]).flatten().tolist():
            others = [n for n in negatives[row, frame].tolist() if codes[row, n] != codes[row, frame]]
            candidates = targets[row, [frame, *others]]
            logits = torch.cosine_similarity(predictions[row, frame][None], candidates) / temperature
            total = total - torch.log_softmax(logits, 0)[0]
            correct += int(bool(others) and logits.argmax() == 0)
    return total, correct


def test_contrastive_sums_equal_the_equation() -> None:
    inputs = _inputs()
    sums = contrastive_sums(**inputs)
    expected, num_correct = _by_loops(**inputs)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=1e-5)
    assert sums.num_correct.item() == num_correct
    gradients = torch.autograd.grad(sums.loss, [inputs["predictions"], inputs["targets"]])
    wanted = torch.autograd.grad(expected, [inputs["predictions"], inputs["targets"]])
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)


def test_padding_does_not_count() -> None:
    inputs = _inputs()
    with torch.no_grad():
        before = contrastive_sums(**inputs)
        inputs["predictions"][~inputs["valid"]] = 123.0
        after = contrastive_sums(**inputs)
    assert before.loss.item() == after.loss.item() and before.num_correct.item() == after.num_correct.item()


def test_a_collapsed_codebook_scores_nothing() -> None:
    inputs = _inputs()
    inputs["codes"] = torch.zeros_like(inputs["codes"])
    sums = contrastive_sums(**inputs)
    assert sums.loss.item() == pytest.approx(0.0, abs=1e-6)  # nothing to tell apart
    assert sums.num_correct.item() == 0.0
    torch.autograd.backward(sums.loss)
    assert torch.isfinite(inputs["predictions"].grad).all()


def test_bfloat16_inputs_are_compared_in_fp32() -> None:
    inputs = _inputs()
    rounded = {**inputs, "predictions": inputs["predictions"].bfloat16(), "targets": inputs["targets"].bfloat16()}
    exact = {**inputs, "predictions": rounded["predictions"].float(), "targets": rounded["targets"].float()}
    assert contrastive_sums(**rounded).loss.dtype == torch.float32
    assert contrastive_sums(**rounded).loss.item() == contrastive_sums(**exact).loss.item()


def test_perplexity_runs_from_collapse_to_uniform_use() -> None:
    collapsed = torch.zeros(2, 4)
    collapsed[:, 1] = 6.0
    assert perplexity(collapsed, torch.tensor(6.0)).item() == pytest.approx(2.0)  # one codeword in each of two groups
    assert perplexity(torch.full((2, 4), 1.5), torch.tensor(6.0)).item() == pytest.approx(8.0)
    both = torch.stack([collapsed, torch.full((2, 4), 1.5)])
    torch.testing.assert_close(perplexity(both, torch.tensor(6.0)), torch.tensor([2.0, 8.0]))


def test_a_codeword_nobody_chooses_has_a_finite_gradient() -> None:
    logits = torch.zeros(4, 1, 3)
    logits[..., 2] = -200.0  # its softmax is exactly 0 in fp32
    logits.requires_grad_()
    quantized = quantize(logits, torch.randn(1, 3, 2), torch.ones(4, dtype=torch.bool), temperature=1.0)
    prob_perplexity = perplexity(quantized.usage, torch.tensor(4.0))[0]
    assert prob_perplexity.item() == pytest.approx(2.0)
    prob_perplexity.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_padding_is_not_counted_as_use() -> None:
    logits = torch.randn(5, 2, 4)
    valid = torch.tensor([True, False, True, True, False])
    counted = quantize(logits, torch.randn(2, 4, 3), valid, temperature=None)
    alone = quantize(logits[valid], torch.randn(2, 4, 3), torch.ones(3, dtype=torch.bool), temperature=None)
    torch.testing.assert_close(counted.usage, alone.usage)


def test_statistics_over_ranks_have_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with different numbers of frames: each gets its part of the gradient that one process would get."""
    torch.manual_seed(0)
    logits = [torch.randn(5, 2, 4, requires_grad=True), torch.randn(9, 2, 4, requires_grad=True)]

    def usage(rank_logits: Tensor) -> Tensor:
        return torch.stack([rank_logits.softmax(-1).sum(0), rank_logits.softmax(-1).detach().round().sum(0)])

    whole = perplexity(usage(torch.cat(logits)), torch.tensor(14.0))
    expected = torch.autograd.grad(whole[0] * 14, logits)

    for rank in (0, 1):
        other = logits[1 - rank].detach()
        theirs = torch.cat([usage(other).flatten(), torch.tensor([float(len(other))])])
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda told, theirs=theirs: told.add_(theirs))
        count = torch.tensor(float(len(logits[rank])))
        total, frames = usage_over_ranks(usage(logits[rank]), count)
        ours = perplexity(total, frames)
        torch.testing.assert_close(ours, whole)
        (found,) = torch.autograd.grad(ours[0] * count, logits[rank])  # its own term of the sum over ranks
        torch.testing.assert_close(found, expected[rank])


def test_quantizer_takes_the_likeliest_codewords_in_evaluation() -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]]])  # N = 1, G = 2, V = 3
    codebook = torch.arange(12.0).view(2, 3, 2)
    quantized = quantize(logits, codebook, torch.tensor([True]), temperature=None)
    assert quantized.vectors.tolist() == [[2.0, 3.0, 6.0, 7.0]]
    assert quantized.codes.tolist() == [1 * 1 + 0 * 3]
    assert quantized.usage[1].tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_gumbel_softmax_draws_by_probability_and_passes_gradients() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    logits = probabilities.log().expand(20_000, 1, 3).clone().requires_grad_()
    codebook = torch.randn(1, 3, 4, requires_grad=True)
    quantized = quantize(logits, codebook, torch.ones(20_000, dtype=torch.bool), temperature=1.0)
    drawn = torch.bincount(quantized.codes, minlength=3) / 20_000
    torch.testing.assert_close(drawn, probabilities, atol=0.02, rtol=0)
    quantized.vectors.sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    found = perplexity(quantized.usage[0], torch.tensor(20_000.0)).item()
    assert found == pytest.approx(math.exp(-(probabilities * probabilities.log()).sum()))


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements any tensor had."""

    def __init__(self) -> None:
        cast(Any, super()).__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.most = max([self.most, *sizes])
        return result


def test_no_tensor_of_negatives_times_features_is_formed() -> None:
    batch, frames, dim, num_negatives = 2, 40, 64, 50
    inputs = _inputs(batch, frames, dim, num_negatives)
    with _LargestTensor() as largest:
        contrastive_sums(**inputs).loss.backward()
    assert largest.most <= batch * frames * max(dim, num_negatives + 1, frames)
    assert largest.most < batch * frames * num_negatives * dim / 10  # what the stock head forms, K x B x T x D

    logits = torch.randn(200, 2, 32, requires_grad=True)
    codebook = torch.randn(2, 32, 48, requires_grad=True)
    with _LargestTensor() as largest:
        quantize(logits, codebook, torch.ones(200, dtype=torch.bool), temperature=1.0).vectors.sum().backward()
    assert largest.most < 200 * 2 * 32 * 48 / 10  # what the stock quantizer forms, B T x G V x d / G
