"""Means, deviations, and whether a difference between two arms could be chance."""

import importlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean difference of an arm to the baseline over their common seeds, its 95 % interval, and the p-value of the
    paired two-sided t-test; the last two are None for fewer than two seeds, or if all differences are equal."""

    mean: float
    interval: tuple[float, float] | None
    p: float | None
    seeds: int


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare seed by seed (seed → metric); None without a common seed. ValueError if scipy is not installed."""
    common = sorted(arm.keys() & baseline.keys())
    if not common:
        return None
    gaps = [arm[seed] - baseline[seed] for seed in common]
    mean = statistics.fmean(gaps)
    if len(gaps) < 2 or len(set(gaps)) == 1:
        return Difference(mean, None, None, len(gaps))
    try:
        student = importlib.import_module("scipy.stats").t(len(gaps) - 1)
    except ImportError as error:
        raise ValueError("scipy is not installed: pip install 'grassland[train]'") from error
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    half = error * float(student.ppf((1 + CONFIDENCE) / 2))
    return Difference(mean, (mean - half, mean + half), 2 * float(student.sf(abs(mean) / error)), len(gaps))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values of one family of tests, adjusted by Holm's step-down procedure; None stays None."""
    order = sorted((p, index) for index, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    running = 0.0
    for rank, (p, index) in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p))
        adjusted[index] = running
    return adjusted
