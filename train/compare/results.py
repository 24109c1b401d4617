"""What the runs of a comparison came to, from their metrics.jsonl, and which learning rate each arm is given."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..log import read_metrics
from ..watch import MAX_SKIPS

Record = dict[str, Any]


class Shown(NamedTuple):
    """How a task is told of. picks: the entry by which validation picks, the smaller the better. entry: what tables
    show, times `factor`, in the format `form`, called `label`. unit: what throughput counts."""

    picks: str
    entry: str
    factor: int
    form: str
    label: str
    unit: str


SHOWN = {
    "lm": Shown("loss", "perplexity", 1, ".2f", "perplexity", "tokens"),
    "vision": Shown("error", "top1", 100, ".2f", "top-1, %", "images"),
}
# What is told of a text beside that: entry, format and name.
FURTHER = {"lm": (("word_perplexity", ",.1f", "word perplexity"), ("bits_per_byte", ".3f", "bits per byte"))}


@dataclass(frozen=True)
class Selection:
    """The learning rate that an arm is given: of those that it has `tried`, in their order, the best in validation with
    the first seed; the only one if none has been tried against others."""

    lr: float
    tried: tuple[float, ...]

    @property
    def edge(self) -> bool:
        """Whether it is the first or the last, so that a wider grid might have done better."""
        return self.lr in self.tried[:1] + self.tried[-1:]

    @property
    def beyond(self) -> float | None:
        """The next rate past the end at which the best one lies, by the factor that the last two are apart there;
        None if there is no such end, a single rate, or two digits cannot tell it from one that was tried."""
        if not self.edge or len(self.tried) < 2:
            return None
        inner = self.tried[1] if self.lr == self.tried[0] else self.tried[-2]
        rate = float(f"{self.lr**2 / inner:.2g}")
        return rate if rate < self.tried[0] or rate > self.tried[-1] else None


def is_done(folder: Path) -> bool:
    """Whether a run got to its end."""
    return (folder / "metrics.jsonl").is_file() and any(e["event"] == "end" for e in read_metrics(folder))


def is_diverged(folder: Path) -> bool:
    """Whether a run ended at a loss or gradient that is not finite, or at too many in a row that were skipped."""
    if not (folder / "metrics.jsonl").is_file() or not (events := read_metrics(folder)):
        return False
    last, skipped = events[-1], [e["step"] for e in events if e["event"] == "skip"][-MAX_SKIPS:]
    return last["event"] == "nan" or (
        last["event"] == "skip" and skipped == list(range(last["step"] + 1 - MAX_SKIPS, last["step"] + 1))
    )


def outcome(folder: Path, task: str) -> Record:
    """What a finished run came to: best validation, test, costs, curve, and the machine it ran on."""
    events = read_metrics(folder)
    start = next(e for e in events if e["event"] == "start")
    end = next(e for e in reversed(events) if e["event"] == "end")
    valid = [e for e in events if e["event"] == "valid"]
    shown, config = SHOWN[task], start["config"]
    per_step = config["batch_size"] * config["grad_accum"] * config.get("seq_len", 1)
    return {
        "unit": shown.unit.removesuffix("s"),
        "steps": end["step"],
        "best_step": end["best_step"],
        # Where the metric was never finite, none is the best.
        "valid": _metrics(([e for e in valid if e["best"]] or valid)[-1]),
        "test": _metrics(next(e for e in reversed(events) if e["event"] == "test")),
        "train_loss": next(e["loss"] for e in reversed(events) if e["event"] == "train"),
        "flops_per_unit": end["flops_per_unit"],
        "units_per_s": end[f"{shown.unit}_per_s"],
        "peak_bytes": end["peak_bytes"],
        "elapsed_s": end["elapsed_s"],
        "curve": {
            "step": [e["step"] for e in valid],
            "units": [e["step"] * per_step for e in valid],
            "seconds": [round(e["elapsed_s"], 3) for e in valid],
            "metric": [e[shown.entry] for e in valid],
        },
        "data": Path(config["data"]).name or config["data"],
        "tested_on": start.get("tested_on", "test"),
        "parameters": start["parameters"],
        "dtype": config["dtype"],
        **_text(start),
        "resumed": [_origin({**start, **e}) for e in events if e["event"] == "resume"],
        **_origin(start),
    }


def alone(folder: Path, task: str) -> Record:
    """How fast a run was that had the device to itself: the median over its lines, but for the first, in which not all
    steps are timed."""
    start, *_, end = events = read_metrics(folder)
    _, *rates = (e[f"{SHOWN[task].unit}_per_s"] for e in events if e["event"] == "train")
    rate = statistics.median(rate for rate in rates if rate is not None)
    return {"units_per_s": rate, "steps": end["step"], **_origin(start)}


def done(records: Iterable[Record]) -> list[Record]:
    """The records of finished runs."""
    return [record for record in records if record["status"] == "done"]


def shown_value(record: Record, split: str) -> float:
    """The metric of a split as tables show it."""
    shown = SHOWN[record["task"]]
    return shown.factor * record[split][shown.entry]


def summary(record: Record) -> str:
    """A run in one line."""
    if record["status"] != "done":
        return f"FAILED: {record['error']}"
    shown = SHOWN[record["task"]]
    valid, test = (f"{split} {shown_value(record, split):{shown.form}}" for split in ("valid", "test"))
    return f"{shown.label} {valid}, {test} ({record['elapsed_s']:.0f} s)"


def select(records: Iterable[Record], seed: int) -> dict[str, Selection]:
    """For each arm with a finished run of `seed` in `records`: the learning rate of the best validation.

    A rate counts as tried if its run finished or diverged; one that was interrupted or lacked memory tells nothing.
    """
    best: dict[str, tuple[float, float]] = {}
    tried: dict[str, list[float]] = {}
    for record in records:
        if record["seed"] != seed:
            continue
        if record["status"] == "done" or record["diverged"]:
            tried.setdefault(record["arm"], []).append(record["lr"])
        if record["status"] == "done":
            value = record["valid"][SHOWN[record["task"]].picks]
            rank = (value if math.isfinite(value) else math.inf, record["lr"])
            best[record["arm"]] = min(best.get(record["arm"], rank), rank)
    return {arm: Selection(lr, tuple(sorted(tried[arm]))) for arm, (_, lr) in best.items()}


def unselected(records: Iterable[Record]) -> dict[str, Selection]:
    """For each arm with a finished run in `records`, all of one learning rate: that one."""
    return {record["arm"]: Selection(record["lr"], ()) for record in done(records)}


def mark(records: Iterable[Record], chosen: Mapping[str, Selection]) -> None:
    """Write into each record whether its learning rate is its arm's, and whether that one is an end of the grid."""
    for record in records:
        selection = chosen.get(record["arm"])
        record["chosen"] = selection is not None and selection.lr == record["lr"]
        record["edge"] = record["chosen"] and selection is not None and selection.edge


def _origin(start: Record) -> Record:
    """When, with which code and on which machine a run was made."""
    # Older runs do not say which kernels they had.
    keys = ("cpu", "cpu_capability", "threads", "gpus", "requested_backend", "extension")
    machine = {key: start["machine"][key] for key in keys if key in start["machine"]}
    about = {"commit": start["commit"], "date": start["date"], "torch": start["versions"]["torch"]}
    return {**about, "device": start["config"]["device"], **machine}


def _text(start: Record) -> Record:
    """Which text a language model saw, and in which tokens; older logs do not say."""
    if "vocab_size" not in start or "splits" not in start:
        return {}
    tokenizer = "/".join(Path(start["config"]["tokenizer"]).parts[-2:])
    words = {split: counts["words"] for split, counts in start["splits"].items()}
    return {"tokenizer": tokenizer, "vocab_size": start["vocab_size"], "words": words, "key": start["data"]}


def _metrics(event: Record) -> dict[str, float]:
    return {key: value for key, value in event.items() if key not in ("event", "step", "best", "elapsed_s")}
