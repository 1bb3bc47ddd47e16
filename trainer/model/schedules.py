"""Learning rate and Gumbel temperature as pure functions of the number of completed updates.

A resumed run, or one on another number of ranks, gets the same values because nothing here has state.
"""

import math

_POLYNOMIAL_END = 1e-7  # transformers' `lr_end` of the polynomial schedule


def learning_rate(step: int, *, peak: float, num_warmup_steps: int, max_train_steps: int, kind: str) -> float:
    """Learning rate of the update made after `step` completed ones (`step` counts from 0).

    The warm-up rises linearly and reaches `peak` at its last update; unlike transformers' schedulers the first update
    is not spent on a learning rate of zero. `kind` is one of `trainer.arguments.LR_SCHEDULER_TYPES`, with their meaning
    in transformers.
    """
    if step < num_warmup_steps and kind != "constant":
        return peak * (step + 1) / num_warmup_steps
    if kind in ("constant", "constant_with_warmup"):
        return peak
    progress = min((step - num_warmup_steps) / max(max_train_steps - num_warmup_steps, 1), 1.0)
    if kind in ("cosine", "cosine_with_restarts"):  # one cycle, so restarts make no difference
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    end = min(_POLYNOMIAL_END, peak) if kind == "polynomial" else 0.0
    return end + (peak - end) * (1.0 - progress)


def gumbel_temperature(step: int, *, maximum: float, minimum: float, decay: float) -> float:
    """Softmax temperature of the quantizer after `step` completed updates: max(maximum x decay^step, minimum)."""
    return max(maximum * decay**step, minimum)
