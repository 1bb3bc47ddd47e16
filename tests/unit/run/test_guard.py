"""A run that cannot go on says so; one that may recover is left alone."""

import pytest

from trainer.errors import RunWentBad
from trainer.run.guard import MAX_SKIPPED_IN_A_ROW, Guard, check_collapse, has_collapsed


def test_only_skipped_updates_in_a_row_count() -> None:
    guard = Guard()
    for step in range(3 * MAX_SKIPPED_IN_A_ROW):
        guard.watch(step, skipped=step % MAX_SKIPPED_IN_A_ROW != 0)
    with pytest.raises(RunWentBad, match=f"{MAX_SKIPPED_IN_A_ROW} updates in a row"):
        for step in range(MAX_SKIPPED_IN_A_ROW):
            guard.watch(step, skipped=True)


@pytest.mark.parametrize(("perplexity", "collapsed"), [(2.0, True), (2.9, True), (3.1, False), (640.0, False)])
def test_one_codeword_per_codebook_is_a_collapse(perplexity: float, collapsed: bool) -> None:
    assert has_collapsed(perplexity, num_codebooks=2) == collapsed


def test_a_collapse_ends_the_run_when_it_lasts() -> None:
    check_collapse(1999, sound_step=1000, patience=1000, code_perplexity=2.0)
    with pytest.raises(RunWentBad, match=r"after update 1000 .*2\.00 at update 2000"):
        check_collapse(2000, sound_step=1000, patience=1000, code_perplexity=2.0)
    check_collapse(10**6, sound_step=0, patience=0, code_perplexity=2.0)
