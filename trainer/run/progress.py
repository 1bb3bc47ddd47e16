"""What a person sees of a run: a bar on a terminal, a line per logging step elsewhere."""

import datetime
import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Loss, accuracy, gradient norm, speed and time left, on standard error of the main rank."""

    def __init__(self, step: int, max_train_steps: int, visible: bool) -> None:
        self.max_train_steps = max_train_steps
        self.visible = visible
        self.first_step = step
        self.start = time.monotonic()
        on_terminal = visible and sys.stderr.isatty()
        self.bar = (
            tqdm(total=max_train_steps, initial=step, desc="pre-training", unit="update", file=sys.stderr)
            if on_terminal
            else None
        )

    def advance(self) -> None:
        """One update is done."""
        if self.bar is not None:
            self.bar.update()

    def show(self, line: dict[str, Any]) -> None:
        """Show one line of `metrics.jsonl`."""
        if not self.visible:
            return
        if self.bar is not None and line["split"] == "train":
            self.bar.set_postfix_str(
                f"loss {line['loss']:.3f}, accuracy {line['accuracy']:.3f}, grad norm {line['grad_norm']:.2f}, "
                f"{line['audio_seconds_per_second']:.0f} s audio/s"
            )
        else:
            self.say(self._text(line))

    def say(self, text: str) -> None:
        """Show a line of text, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.visible:
            print(text, file=sys.stderr, flush=True)

    def _text(self, line: dict[str, Any]) -> str:
        parts = [
            f"{line['split']:<10} {line['step']:>7}/{self.max_train_steps}",
            f"loss {line['loss']:.4f}",
            f"contrastive {line['contrastive_loss']:.4f}",
            f"accuracy {line['accuracy']:.4f}",
            f"code perplexity {line['code_perplexity']:.1f}",
        ]
        if line["split"] == "train":
            parts += [
                f"grad norm {line['grad_norm']:.3f}",
                f"{line['audio_seconds_per_second']:.1f} s audio/s",
                f"{self._time_left(line['step'])} left",
            ]
        return " | ".join(parts)

    def _time_left(self, step: int) -> datetime.timedelta:
        done = max(step - self.first_step, 1)
        seconds = (time.monotonic() - self.start) / done * (self.max_train_steps - step)
        return datetime.timedelta(seconds=round(seconds))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
