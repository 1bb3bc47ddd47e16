"""The loss head against stock transformers' in memory and values, and under torch.compile. Times: tests/benchmarks/."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.benchmarks.live_memory import LiveMemory
from tests.benchmarks.loss_head import (
    MAX_DIFFERENCE,
    MIN_HEAD_MEMORY_RATIO,
    MIN_QUANTIZER_MEMORY_RATIO,
    Case,
    Side,
    Size,
    build_case,
    compare,
    no_gumbel_noise,
    quantizer_peaks,
)
from trainer.model.objective import contrastive_sums, perplexity, quantize


def test_live_memory_counts_a_storage_once_from_its_birth_to_its_end() -> None:
    before = torch.zeros(100)  # 400 bytes each
    memory = LiveMemory()
    with memory:
        view_of_before = before.view(10, 10)
        first = before + 1
        view = first.view(10, 10)[2:]
        assert (memory.live_bytes, memory.peak_bytes) == (400, 400)
        del first
        assert memory.live_bytes == 400  # its view holds the storage
        second = torch.exp(view_of_before)
        assert (memory.live_bytes, memory.peak_bytes) == (800, 800)
        del view, second
        assert (memory.live_bytes, memory.peak_bytes) == (0, 800)


def test_live_memory_sees_the_backward_pass() -> None:
    leaf = torch.zeros(100, requires_grad=True)
    memory = LiveMemory()
    with memory:
        loss = leaf.exp().sum()  # 400 bytes kept for backward, 4 of the loss
        assert memory.live_bytes == 404
        # the loss' gradient (4) and its view of 100; then the product, which becomes leaf.grad
        loss.backward()
        assert memory.peak_bytes == 404 + 4 + 400
        del loss
        assert memory.live_bytes == 400
        leaf.grad = None
        assert memory.live_bytes == 0


@pytest.fixture(scope="module")
def case() -> Case:
    return build_case(Size(batch_size=2, num_frames=90))


@pytest.fixture(scope="module")
def comparison(case: Case) -> tuple[tuple[int, int], dict[str, float]]:
    with no_gumbel_noise():
        return compare(case)


def test_head_needs_a_twentieth_of_the_memory(comparison: tuple[tuple[int, int], dict[str, float]]) -> None:
    stock, ours = comparison[0]
    assert stock >= MIN_HEAD_MEMORY_RATIO * ours


def test_loss_and_each_gradient_equal_stock(comparison: tuple[tuple[int, int], dict[str, float]]) -> None:
    differences = comparison[1]
    assert differences.keys() == {
        *("loss", "whole gradient", "wav2vec2.encoded", "wav2vec2.features", "quantizer.codevectors"),
        *("project_hid.weight", "project_q.weight", "quantizer.weight_proj.weight"),
        *("project_hid.bias", "project_q.bias", "quantizer.weight_proj.bias"),
    }
    for name, difference in differences.items():
        # the terms of these two sums over frames nearly cancel: stock's own rounding error is 0.7e-5 of what is left
        cancels = name in ("project_hid.bias", "project_q.bias")
        assert difference <= MAX_DIFFERENCE * (5 if cancels else 1), name


def test_loss_and_each_gradient_equal_stock_to_the_last_digits_in_float64() -> None:
    case = build_case(Size(batch_size=2, num_frames=60, dim=64))
    case.stock.model.double()
    case.ours.model.double()
    with no_gumbel_noise(), patch.object(torch.Tensor, "float", torch.Tensor.double):  # both cast what they add up
        _, differences = compare(case)
    assert len(differences) == 11
    assert all(difference <= 1e-12 for difference in differences.values()), differences


@pytest.mark.parametrize("same_frames", [False, True])
def test_quantizer_needs_a_fifth_of_the_memory(case: Case, same_frames: bool) -> None:
    with no_gumbel_noise():
        stock, ours = quantizer_peaks(case, same_frames=same_frames)
    assert stock >= MIN_QUANTIZER_MEMORY_RATIO * ours


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def small() -> Side:
    return build_case(Size(batch_size=2, num_frames=30, num_negatives=10, dim=64)).ours


def _loss_and_gradients(side: Side, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)  # the same Gumbel noise every time
    side.model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return {"loss": value.detach(), **side.gradients()}


@pytest.mark.parametrize("training", [True, False])
def test_compiled_head_is_one_graph_with_the_same_values(small: Side, training: bool) -> None:
    small.model.train(training)
    eager = _loss_and_gradients(small, small.loss)
    compiled = _loss_and_gradients(small, torch.compile(small.loss, fullgraph=True, backend="aot_eager"))
    assert len(eager) == 10
    torch.testing.assert_close(compiled, eager)
    explanation = torch._dynamo.explain(small.loss)()
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def _objective_calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    valid = torch.rand(2, 9, generator=generator) > 0.3
    codes, negatives = torch.arange(18).view(2, 9) % 5, torch.randint(0, 9, (2, 9, 4), generator=generator)
    logits, codebook = draw(18, 2, 8), draw(2, 8, 3)
    return {
        "quantize with noise": (quantize, (logits, codebook, valid.view(-1), 1.5)),
        "quantize without": (quantize, (logits, codebook, valid.view(-1), None)),
        "perplexity": (perplexity, (draw(2, 2, 8).abs(), valid.sum().float())),
        "contrastive_sums": (contrastive_sums, (draw(2, 9, 5), draw(2, 9, 5), codes, negatives, valid, 0.1)),
    }


@pytest.mark.parametrize("name", _objective_calls())
def test_each_part_of_the_objective_compiles_without_a_break(name: str) -> None:
    function, arguments = _objective_calls()[name]
    torch.manual_seed(3)
    eager = function(*arguments)
    torch.manual_seed(3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, eager)
    explanation = torch._dynamo.explain(function)(*arguments)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
