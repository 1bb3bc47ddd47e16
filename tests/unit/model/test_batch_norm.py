import copy

import pytest
import torch

from trainer.model.batch_norm import BatchNorm, recomputing, running_statistics


@pytest.fixture
def norm() -> BatchNorm:
    torch.manual_seed(0)
    norm = BatchNorm(3)
    torch.nn.init.normal_(norm.weight)
    norm.train()
    return norm


def test_it_is_torchs_in_fp32(norm: BatchNorm) -> None:
    stock = torch.nn.BatchNorm1d(3)
    stock.load_state_dict(norm.state_dict())
    for training in (True, True, False):
        norm.train(training)
        stock.train(training)
        values = torch.randn(4, 3, 5)
        inputs = [values.clone().requires_grad_(), values.clone().requires_grad_()]
        outputs = [norm(inputs[0]), stock(inputs[1])]
        torch.testing.assert_close(outputs[0], outputs[1])
        outputs[0].square().sum().backward()
        outputs[1].square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)


def test_bf16_input_keeps_its_type_and_statistics_theirs(norm: BatchNorm) -> None:
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    assert norm(torch.randn(4, 3, 5).bfloat16()).dtype == torch.bfloat16
    assert {statistic.dtype for statistic in running_statistics(norm)} == {torch.float32}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_batch_that_is_not_finite_leaves_no_trace(norm: BatchNorm, bad: float) -> None:
    norm(torch.randn(4, 3, 5))
    before = [statistic.clone() for statistic in running_statistics(norm)]
    values = torch.randn(4, 3, 5)
    values[0, 1, 0] = bad
    norm(values)
    for statistic, kept in zip(running_statistics(norm), before, strict=True):
        assert statistic[1] == kept[1]
        assert statistic[0] != kept[0] and torch.isfinite(statistic).all()  # channels that were fine go on


def test_recomputation_gives_the_same_and_records_nothing(norm: BatchNorm) -> None:
    values = torch.randn(4, 3, 5)
    first = norm(values)
    state = copy.deepcopy(norm.state_dict())
    with recomputing([norm]):
        again = norm(values)
    assert torch.equal(first, again)
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in state.items())
    norm(values)
    assert not torch.equal(norm.running_mean, state["running_mean"])  # type: ignore[arg-type]
