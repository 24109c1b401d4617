"""Means, deviations, and whether a difference between two arms could be chance."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..optional import optional

CONFIDENCE = 0.95
# Differences that are further apart only by less than this, relative to the metrics, are equal but for rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Difference:
    """Mean difference of an arm to the baseline over their common seeds, its 95 % interval, and the p-value of the
    paired two-sided t-test; the last two are None for fewer than two seeds, if all differences are equal but for
    rounding, or if one is not finite."""

    mean: float
    interval: tuple[float, float] | None
    p: float | None
    seeds: int


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None of a single value, or if one is not finite."""
    deviates = len(values) > 1 and all(map(math.isfinite, values))
    return mean(values), statistics.stdev(values) if deviates else None


def mean(values: Sequence[float]) -> float:
    """The mean; infinite or NaN if a value is."""
    # fmean raises where infinities cancel.
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare seed by seed (seed → metric); None without a common seed. ValueError if scipy is not installed."""
    common = sorted(arm.keys() & baseline.keys())
    if not common:
        return None
    gaps = [arm[seed] - baseline[seed] for seed in common]
    largest = max(abs(values[seed]) for values in (arm, baseline) for seed in common)
    if not all(map(math.isfinite, gaps)) or max(gaps) - min(gaps) <= ROUNDING * largest:
        return Difference(mean(gaps), None, None, len(gaps))
    student = optional("scipy.stats", "train").t(len(gaps) - 1)
    middle, error = mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    half = error * float(student.ppf((1 + CONFIDENCE) / 2))
    return Difference(middle, (middle - half, middle + half), 2 * float(student.sf(abs(middle) / error)), len(gaps))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values of one family of tests, adjusted by Holm's step-down procedure; None stays None."""
    order = sorted((p, index) for index, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    running = 0.0
    for rank, (p, index) in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p))
        adjusted[index] = running
    return adjusted
