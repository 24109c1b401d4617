"""What the command line says of a comparison."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...archs.registry import unknown
from ..config import EPOCHS, RunConfig, parse_setting
from .plan import Comparison

# Settings that the comparison itself decides.
DECIDED = {"model", "set", "lr", "seed", "out", "resume"}


@dataclass(frozen=True)
class CompareOptions:
    """Arms × learning rates × seeds on one data set with one loop; what is done already is not run again."""

    preset: str
    """wikitext2-paper, wikitext2-tuned, controls, residuals, sharing, heads, imagenet-RECIPE, wikitext2-cpu,
    cifar10-cpu, smoke; or a JSON file."""
    out: Path | None = None
    """Folder of the runs and of report.md, report.jsonl and the pictures; by default runs/compare-PRESET."""
    only: tuple[str, ...] = ()
    """These of the preset's comparisons alone."""
    arms: tuple[str, ...] = ()
    """These arms alone."""
    lrs: tuple[float, ...] = ()
    """Another grid of learning rates."""
    seeds: tuple[int, ...] = ()
    """Other seeds; the learning rate is chosen with the first."""
    widen: int = 2
    """How many rates more an arm may try, one at a time, while its best one is an end of the grid."""
    settings: tuple[str, ...] = ()
    """Settings of `train lm` or `train vision` for every arm: steps=200 data=PATH tokenizer=PATH dtype=bf16 …"""
    jobs: int = 1
    """Runs at a time; they share the device and the threads, so throughput is then measured for each arm alone."""
    plan: bool = False
    """Only say what would be run."""
    report_only: bool = False
    """Only write the report of what is done."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be positive, got {self.jobs}")
        if self.widen < 0:
            raise ValueError(f"widen must be at least 0, got {self.widen}")

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.out or Path("runs") / f"compare-{Path(self.preset).stem}"

    def applied_to(self, plans: Sequence[Comparison]) -> list[Comparison]:
        """The chosen comparisons with these options; ValueError for names that none of them has."""
        _check("comparison", self.only, [plan.name for plan in plans])
        chosen = [plan for plan in plans if not self.only or plan.name in self.only]
        _check("arm", self.arms, [arm for plan in chosen for arm in plan.arms])
        changes = dict(map(parse_setting, self.settings))
        known = {f.name for plan in chosen for arm in plan.arms.values() for f in fields(arm)} - DECIDED
        _check("setting", changes, known)
        return [self._narrowed(plan, changes) for plan in chosen if not self.arms or set(self.arms) & set(plan.arms)]

    def _narrowed(self, plan: Comparison, changes: dict[str, Any]) -> Comparison:
        arms = {name: changed(arm, changes) for name, arm in plan.arms.items() if not self.arms or name in self.arms}
        return replace(plan, arms=arms, lrs=self.lrs or plan.lrs, seeds=self.seeds or plan.seeds)


def changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The settings with those of `changes` that are theirs."""
    own = {name: value for name, value in changes.items() if hasattr(config, name)}
    dropped = {EPOCHS[name]: None for name in own if name in EPOCHS and EPOCHS[name] not in changes}
    return replace(config, **{**dropped, **own})


def _check(what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown(what, name, set(known))
