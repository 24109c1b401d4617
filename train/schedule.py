"""Learning-rate schedules as pure functions from a step to a multiplier of the base rate."""

import math
from collections.abc import Sequence

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
