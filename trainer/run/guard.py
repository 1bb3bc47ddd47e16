"""Notices when training cannot go on."""

import dataclasses

from trainer.errors import RunWentBad

MAX_SKIPPED_IN_A_ROW = 20


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
