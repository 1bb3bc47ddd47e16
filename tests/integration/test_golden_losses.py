"""Fifty updates of the demo recipe must give the stored losses: a change of numerics shows here first."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("golden_losses", Path(__file__).with_name("golden_losses.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _load()


def test_losses_of_the_demo_are_the_stored_ones(tmp_path: Path) -> None:
    stored = golden.read_stored()
    found = golden.run_demo(tmp_path)
    same_platform = stored["platform"] == golden.this_platform()
    limit = 0.0 if same_platform else golden.TOLERANCE_ELSEWHERE
    assert len(found) == len(stored["updates"]) == golden.NUM_UPDATES
    worst = max(
        golden.difference(ours["loss"], theirs["loss"]) for ours, theirs in zip(found, stored["updates"], strict=True)
    )
    if worst > 0:
        print(golden.table(found, stored["updates"]))
        print("on", golden.this_platform(), "against", stored["platform"], sep="\n  ")
    if worst > limit:
        pytest.fail(f"losses differ by up to {worst:.1e} where {limit} is allowed; the table is above")
    if same_platform:
        assert found == stored["updates"]  # norms and perplexities too
