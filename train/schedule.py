"""Learning-rate schedules as pure functions from a step to a multiplier of the base rate, and lengths in steps."""

import math
from collections.abc import Sequence

from .config import RunConfig

SCHEDULES = ("cosine", "linear", "step", "wsd", "constant")


def multiplier(
    step: int,
    steps: int,
    schedule: str,
    *,
    warmup: int = 0,
    decay: float = 0.2,
    floor: float = 0.0,
    milestones: Sequence[float] = (0.3, 0.6, 0.9),
) -> float:
    """The factor on the base learning rate at `step` (counted from 0) of `steps`.

    Every schedule rises linearly over `warmup` steps, reaching 1 at step `warmup - 1`. "cosine" then falls to `floor`
    along half a cosine and "linear" along a line; "step" falls to a tenth at each of `milestones`, fractions of the
    steps, and knows no floor; "wsd" (warm-up, stable, decay) stays at 1 and falls linearly to `floor` over the last
    `decay` fraction of the steps; "constant" stays. The floor itself would be reached at step `steps`, one past the
    last.

    Raises ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 0.1 ** sum(step >= round(milestone * steps) for milestone in milestones)
    start = warmup if schedule in ("cosine", "linear") else max(warmup, steps - round(decay * steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return floor + (1 - floor) * falling


def total_steps(config: RunConfig, batches_per_epoch: float) -> int:
    """The optimiser steps of a run; epochs are rounded up to whole steps. ValueError for more than there can be."""
    if config.epochs is None:
        return config.steps or 0
    exact = config.epochs * batches_per_epoch / config.grad_accum
    if math.isinf(exact):
        raise ValueError(f"epochs must be fewer, got {config.epochs}")
    # 1.1 epochs of 100 steps are 110.00000000000001 in floating point.
    return max(1, math.ceil(round(exact, 6)))


def in_steps(config: RunConfig, epochs: float | None, batches_per_epoch: float, otherwise: int) -> int:
    """So many epochs as optimiser steps, at least one; `otherwise` if no epochs are given."""
    if epochs is None:
        return otherwise
    return max(1, round(epochs * batches_per_epoch / config.grad_accum)) if epochs > 0 else 0
