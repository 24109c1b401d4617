"""Curves of a comparison: validation against steps, against tokens or images, and against wall time."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..optional import optional
from ..plot import scale_by_log
from .report import by
from .results import SHOWN, Record, done
from .statistics import mean


def plot(records: Sequence[Record], path: Path) -> bool:
    """One line an arm at its learning rate, the mean over seeds, and the range of the seeds around it; whether there
    is any to draw."""
    chosen = [record for record in done(records) if record["chosen"]]
    if not chosen:
        return False
    figure: Any = optional("matplotlib.figure", "train").Figure(figsize=(15, 4.4), layout="constrained")
    task, curves = chosen[0]["task"], by(chosen, "arm")
    rates, clock = {arm: rate for arm, runs in curves.items() if (rate := _alone(runs))}, "wall time, minutes"
    if len(rates) == len(curves):
        clock = "wall time of an arm alone, minutes"
        curves = {arm: [_timed(run, rates[arm]) for run in runs] for arm, runs in curves.items()}
    panels = (("step", "step", 1), ("units", f"{chosen[0]['unit']}s", 1), ("seconds", clock, 1 / 60))
    arms = [arm for arm in by(records, "arm") if arm in curves]
    for axes, (key, label, factor) in zip(figure.subplots(1, 3), panels, strict=True):
        for index, arm in enumerate(arms):
            runs = curves[arm]
            _curve(axes, runs, key, factor, f"C{index % 10}", arm if len(runs) == 1 else f"{arm} ({len(runs)} seeds)")
        axes.set(xlabel=label, ylabel=f"validation {SHOWN[task].label}")
        if task == "lm":
            scale_by_log(axes)
        if key == "units":
            axes.xaxis.set_major_formatter(optional("matplotlib.ticker", "train").EngFormatter())
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(chosen[0]["title"])
    figure.savefig(path, dpi=110)
    return True


def _alone(runs: Sequence[Record]) -> float | None:
    """The rate of an arm that had the machine to itself, where it was measured."""
    return next((rate for run in runs if (rate := run.get("alone", {}).get("units_per_s"))), None)


def _timed(run: Record, rate: float) -> Record:
    """With the seconds that its units take at this rate: its own are those of a run that shared the machine."""
    return run | {"curve": run["curve"] | {"seconds": [units / rate for units in run["curve"]["units"]]}}


def _curve(axes: Any, runs: Sequence[Record], key: str, factor: float, colour: str, label: str) -> None:
    """Runs of one arm validate at the same steps, but need not take the same time to get there."""
    scale = SHOWN[runs[0]["task"]].factor
    x = [factor * statistics.fmean(place) for place in zip(*(run["curve"][key] for run in runs), strict=True)]
    columns = list(zip(*([scale * value for value in run["curve"]["metric"]] for run in runs), strict=True))
    axes.plot(x, [mean(column) for column in columns], "o-", ms=3, color=colour, label=label)
    if len(runs) > 1:
        axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, lw=0)
