"""The table of `gradients.py` held to its tolerances: the central promise, over engines, ranks and accumulation."""

from typing import Any

import pytest

from tests.parity import gradients


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gradients.run_all(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def rows(outcomes: Any) -> dict[str, Any]:
    found = gradients.compare(outcomes)
    print("\n" + gradients.table(found))
    return {"-".join(map(str, row.case)): row for row in found}


def test_micro_batches_of_a_window_have_unequal_numbers_of_targets() -> None:
    counts = {
        ranks * accumulation: [
            batch.num_targets
            for rank in range(ranks)
            for batch in gradients.window(0, accumulation, rank=rank, ranks=ranks)
        ]
        for ranks in gradients.RANKS
        for accumulation in gradients.ACCUMULATIONS
    }
    assert len({sum(values) for values in counts.values()}) == 1  # the same window
    assert all(len(set(values)) > 1 for split, values in counts.items() if split > 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_do_not_depend_on_engine_and_split(rows: dict[str, Any], precision: str) -> None:
    rows = {name: row for name, row in rows.items() if row.case.precision == precision}
    assert len(rows) == 5 * 2 * 3
    limit = gradients.TOLERANCE[precision]
    assert {name: row.gradient for name, row in rows.items() if not row.gradient <= limit} == {}
    assert {
        name: row.gradient_with_diversity for name, row in rows.items() if not row.gradient_with_diversity <= limit
    } == {}


def test_the_reported_norm_is_that_of_the_gradient_before_clipping(rows: dict[str, Any]) -> None:
    assert {name: row.norm for name, row in rows.items() if not row.norm <= 1e-6} == {}


def test_the_learning_rate_is_the_one_that_was_set(outcomes: Any) -> None:
    assert {outcome.learning_rates for outcome in outcomes.values()} == {(1e-3,) * gradients.NUM_UPDATES}


def test_ten_updates_lead_to_the_same_parameters(rows: dict[str, Any]) -> None:
    fp32 = {name: row.parameters for name, row in rows.items() if row.case.precision == "fp32"}
    assert {name: value for name, value in fp32.items() if not value <= 1e-4} == {}
