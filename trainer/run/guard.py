"""Notices when training cannot go on."""

import dataclasses

from trainer.errors import RunWentBad

MAX_SKIPPED_IN_A_ROW = 20
# Per codebook, as a perplexity: with hardly more than one codeword every frame has the same target.
COLLAPSED_CODEWORDS = 1.5


@dataclasses.dataclass
class Guard:
    """Counts updates in a row that were left out because their gradient was not finite."""

    skipped_in_a_row: int = 0

    def watch(self, step: int, skipped: bool) -> None:
        """Call after every update. Raises `RunWentBad` after too many skipped ones in a row."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RunWentBad(
                f"the gradient was not finite in {self.skipped_in_a_row} updates in a row (last: update {step}). "
                "Resume from an earlier checkpoint with a lower --learning_rate or --max_grad_norm."
            )


def has_collapsed(code_perplexity: float, num_codebooks: int) -> bool:
    """Whether so few codewords are in use (`code_perplexity` is summed over codebooks) that they tell nothing apart.

    The loss does not show it: among equal targets there is nothing to confuse, so it falls to almost 0.
    """
    return code_perplexity < COLLAPSED_CODEWORDS * num_codebooks


def check_collapse(step: int, sound_step: int, patience: int, code_perplexity: float) -> None:
    """Raise `RunWentBad` when the codebooks have been collapsed since `sound_step`, `patience` updates or longer ago.

    Early in training few codewords may be in use for some hundred updates, from which a run recovers; 0 waits for ever.
    """
    if patience and step - sound_step >= patience:
        raise RunWentBad(
            f"the codebooks have collapsed: after update {sound_step} code_perplexity stayed at hardly more than one "
            f"codeword per codebook ({code_perplexity:.2f} at update {step}), so all targets are the same and a low "
            f"loss means nothing. Resume from a checkpoint up to update {sound_step}, or start anew, with a lower "
            "--learning_rate, a longer warm-up (--num_warmup_steps) or slower --gumbel_temperature_decay. "
            "(--collapse_patience 0 would let it go on.)"
        )
