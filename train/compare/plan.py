"""What is compared: arms, learning rates, seeds."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import LMConfig, RunConfig, VisionConfig

TASKS: dict[str, type[RunConfig]] = {"lm": LMConfig, "vision": VisionConfig}
# What a run may have otherwise and still be the same run.
FREE = frozenset({"out", "resume", "workers", "tensorboard", "save_every", "log_every"})
KEYS = frozenset({"name", "title", "note", "task", "settings", "arms", "lrs", "seeds"})


@dataclass(frozen=True)
class Comparison:
    """Arms (name → settings, whose lr and seed do not count), of which the first is the one that differences are to.

    Every arm runs every learning rate of `lrs` with the first of `seeds`, and further ones past an end at which it is
    best; the one with the best validation then runs the other seeds. note: what a reader must know before believing
    the table. ValueError names what is wrong.
    """

    name: str
    title: str
    arms: Mapping[str, RunConfig]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    note: str = ""

    def __post_init__(self) -> None:
        for name in (self.name, *self.arms):
            if not name or name in (".", "..") or set(name) & set("/\\"):
                raise ValueError(f"{name!r} cannot name a comparison or an arm: it names a folder")
        if not self.arms:
            raise ValueError(f"{self.name}: a comparison needs at least one arm")
        if len({type(arm) for arm in self.arms.values()}) > 1:
            raise ValueError(f"{self.name}: arms must be of one task, got {sorted({task_of(a) for a in self._runs})}")
        if not self.lrs or not all(math.isfinite(lr) and lr > 0 for lr in self.lrs):
            raise ValueError(f"{self.name}: lrs must be positive numbers, got {self.lrs}")
        if not self.seeds or not all(isinstance(s, int) and s >= 0 for s in self.seeds):
            raise ValueError(f"{self.name}: seeds must be integers of at least 0, got {self.seeds}")
        # Their folders are named by six digits of the rate.
        for what, values in (("lrs", [f"{lr:g}" for lr in self.lrs]), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{self.name}: {what} must differ from each other, got {getattr(self, what)}")

    @property
    def _runs(self) -> list[RunConfig]:
        return list(self.arms.values())

    @property
    def task(self) -> str:
        """lm or vision."""
        return task_of(self._runs[0])

    def config(self, arm: str, lr: float, seed: int) -> RunConfig:
        """The settings of one run."""
        return replace(self.arms[arm], lr=lr, seed=seed)

    def differing(self) -> dict[str, dict[str, Any]]:
        """For each arm the settings that not all arms have in common."""
        values = {name: arm.to_dict() for name, arm in self.arms.items()}
        names = [key for key in next(iter(values.values())) if key not in ("lr", "seed")]
        odd = [key for key in names if len({json.dumps(arm[key]) for arm in values.values()}) > 1]
        return {name: {key: arm[key] for key in odd} for name, arm in values.items()}

    def describe(self) -> str:
        """What would be run, in text."""
        first, more = len(self.arms) * len(self.lrs), len(self.arms) * (len(self.seeds) - 1)
        grid = f"lr {', '.join(f'{lr:g}' for lr in self.lrs)}; seeds {', '.join(map(str, self.seeds))}"
        arms = "\n".join(f"  {name}: {facts or 'as all'}" for name, facts in self.differing().items())
        return f"{self.name}: {self.title}. {grid}; {first} + {more} runs\n{arms}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """From JSON: name, title, note, task ("lm" or "vision"), settings (of every arm), arms (name → its own
        settings; "set" is added to that of `settings`), lrs, seeds. ValueError for what is unknown or missing."""
        if unknown := values.keys() - KEYS:
            raise ValueError(f"a comparison has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(KEYS))}")
        if missing := {"name", "task", "arms", "lrs"} - values.keys():
            raise ValueError(f"a comparison needs {', '.join(sorted(missing))}")
        if values["task"] not in TASKS:
            raise ValueError(f"task must be one of {tuple(TASKS)}, got {values['task']!r}")
        kind, common = TASKS[values["task"]], dict(values.get("settings", {}))
        arms = {name: kind.from_dict(merged(common, own)) for name, own in values["arms"].items()}
        rest: dict[str, Any] = {key: tuple(values[key]) for key in ("lrs", "seeds") if key in values}
        rest |= {"title": values.get("title", values["name"]), "note": values.get("note", "")}
        return cls(name=values["name"], arms=arms, **rest)


def merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's settings over those of all arms; what `--set` says of the model adds up."""
    return {**common, **own, "set": (*common.get("set", ()), *own.get("set", ()))}


def read_comparisons(path: Path) -> list[Comparison]:
    """The comparison, or the list of them with names of their own, of a JSON file. ValueError that names the file."""
    try:
        content = json.loads(path.read_text())
        plans = [Comparison.from_dict(entry) for entry in (content if isinstance(content, list) else [content])]
        if twice := [name for name, count in Counter(plan.name for plan in plans).items() if count > 1]:
            raise ValueError(f"more than one comparison is named {', '.join(twice)}")
        return plans
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def task_of(config: RunConfig) -> str:
    return next(name for name, kind in TASKS.items() if isinstance(config, kind))
