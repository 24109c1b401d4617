"""Curves of one run or several, from their metrics.jsonl."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .log import read_metrics
from .optional import optional

CURVES_FILE = "curves.png"
Event = dict[str, Any]


def plot_runs(folders: Sequence[Path], out: Path) -> None:
    """Write a PNG with the loss, the validation metric and the throughput of each run against its steps.

    Raises FileNotFoundError for a folder without metrics.jsonl, ValueError if there is no folder, matplotlib is not
    installed or `out` is no name of a picture.
    """
    if not folders:
        raise ValueError("folders must be one or more runs, got none")
    if not out.suffix:  # matplotlib would write another file
        raise ValueError(f"out must name a picture, such as {out / CURVES_FILE}, got {out}")
    runs = {name: read_metrics(folder) for name, folder in labelled(folders).items()}
    figure = optional("matplotlib.figure", "train").Figure(figsize=(15, 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 3), (_loss, _quality, _throughput), strict=True):
        for name, events in runs.items():
            panel(axes, events, name if len(runs) > 1 else "")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def labelled(folders: Sequence[Path | str]) -> dict[str, Path]:
    """Each folder once, by its name, or by as much of the path's end as tells them apart."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(paths):
        parts += 1
    return {str(Path(*path.parts[-parts:])): path for path in paths}


def try_plot(folder: Path) -> str:
    """Plot a run into its folder if that is possible; where the curves are, or why there are none."""
    try:
        plot_runs([folder], folder / CURVES_FILE)
    except ValueError as error:
        return f"no curves: {error}"
    return f"curves: {folder / CURVES_FILE}"


def _loss(axes: Any, events: list[Event], name: str) -> None:
    (line,) = axes.plot(*_series(events, "train", "loss"), label=f"{name} train".strip())
    axes.plot(*_series(events, "valid", "loss"), "o--", ms=3, color=line.get_color(), label=f"{name} valid".strip())
    axes.set_ylabel("loss")


def _quality(axes: Any, events: list[Event], name: str) -> None:
    shown = ("perplexity", "top1", "accuracy", "f1")
    metric = next((key for e in events if e["event"] == "valid" for key in shown if key in e), "loss")
    axes.plot(*_series(events, "valid", metric), "o-", ms=3, label=name or None)
    axes.set_ylabel(f"validation {metric}")
    if metric == "perplexity":
        scale_by_log(axes)


def scale_by_log(axes: Any) -> None:
    """A logarithmic y axis, if there is anything on it: matplotlib refuses one of infinities."""
    if any(0 < value < math.inf for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log")


def _throughput(axes: Any, events: list[Event], name: str) -> None:
    unit = next((key for e in events if e["event"] == "train" for key in e if key.endswith("_per_s")), "tokens_per_s")
    axes.plot(*_series(events, "train", unit), label=name or None)
    axes.set_ylabel(unit.replace("_per_s", " a second"))
    axes.set_ylim(bottom=0)


def _series(events: list[Event], event: str, key: str) -> tuple[list[int], list[float]]:
    has: Callable[[Event], bool] = lambda e: e["event"] == event and e.get(key) is not None  # noqa: E731
    return [e["step"] for e in events if has(e)], [e[key] for e in events if has(e)]
