"""Running what a comparison still lacks, each run in a process of its own."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from ...archs import read_config
from ..checkpoint import has_state
from ..config import RunConfig
from ..start import AUTO
from .plan import FREE, Comparison
from .results import SHOWN, Record, is_done, outcome, select

# Imported once, in the process from which the runs are forked: several seconds that a run need not spend.
PRELOADED = ["grassland.train.start", "grassland.train.tasks.lm", "grassland.train.tasks.vision", "matplotlib.figure"]
PRELOADED += ["timm", "torchvision", "sklearn.datasets"]


class Runner:
    """The runs of a comparison in `folder`/ARM/lrLR-seedSEED, each with its log beside it.

    A finished run is taken as it is, an interrupted one is resumed, one that failed is tried again. context: what
    `processes` gives; None to run nothing.
    """

    def __init__(self, plan: Comparison, folder: Path, context: Any) -> None:
        self.plan, self.folder, self.context = plan, folder, context
        self.finished: list[Record] = []

    def records(self) -> list[Record]:
        """One record a run: the grid with the first seed, then the other seeds at each arm's best learning rate.

        Raises ValueError if a run in the folder has other settings than planned.
        """
        plan, first = self.plan, self.plan.seeds[0]
        for lr in plan.lrs:
            self._round([(arm, lr, first) for arm in plan.arms])
        chosen = select(self.finished, plan.lrs, first)
        for seed in plan.seeds[1:]:
            self._round([(arm, chosen[arm].lr, seed) for arm in plan.arms if arm in chosen])
        for record in self.finished:
            selection = chosen.get(record["arm"])
            record["chosen"] = selection is not None and selection.lr == record["lr"]
            record["edge"] = record["chosen"] and selection is not None and selection.edge
        return self.finished

    def _round(self, runs: list[tuple[str, float, int]]) -> None:
        for arm, lr, seed in runs:
            name = f"{self.plan.name}/{arm} lr {lr:g} seed {seed}"
            record = self._record(arm, lr, seed)
            self.finished.append(record)
            print(f"{name}: {_summary(record)}", flush=True)

    def _record(self, arm: str, lr: float, seed: int) -> Record:
        plan, config = self.plan, self.plan.config(arm, lr, seed)
        folder = self.folder / arm / f"lr{lr:g}-seed{seed}"
        about = {"comparison": plan.name, "title": plan.title, "note": plan.note, "task": plan.task, "arm": arm}
        about |= {"lr": lr, "seed": seed, "differs": plan.differing()[arm]}
        reason = self._run(config, folder)
        if reason is not None:
            return {**about, "status": "failed", "error": reason}
        return {**about, "status": "done", **outcome(folder, plan.task)}

    def _run(self, config: RunConfig, folder: Path) -> str | None:
        """Make sure that the run is done; the reason if it cannot be."""
        started, ended = has_state(folder), is_done(folder)
        if started or ended:
            _check_same(folder, config)
        if ended:
            return None
        if self.context is None:
            return "interrupted" if started else "not run"
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        process = self.context.Process(target=train, args=(replace(config, out=str(folder), resume=AUTO), log))
        with _ended(process):
            process.join()
        if is_done(folder):
            return None
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return f"{lines[-1] if lines else 'no output'} (exit code {process.exitcode}, {log})"


def train(config: RunConfig, log: Path) -> None:
    """One run, in a process of its own; what it prints goes to `log`."""
    with log.open("ab") as file:
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    from ..start import run
    from .plan import task_of

    if task_of(config) == "lm":
        from ..tasks.lm import LanguageModeling as Task
    else:
        from ..tasks.vision import ImageClassification as Task
    try:
        code = run(Task, config)  # type: ignore[arg-type]
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code)


def processes() -> Any:
    """A multiprocessing context whose processes are forked from one that has imported what runs need, where it is
    installed, and has used none of it; where there is no fork, they are new ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@contextmanager
def _ended(process: Any) -> Iterator[None]:
    """Start a process and see it end, also when this one is asked to stop: then the run saves itself first."""

    def stop(number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the run by itself.
        process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    process.start()
    try:
        yield
    finally:
        process.join()
        signal.signal(signal.SIGTERM, before)


def _check_same(folder: Path, config: RunConfig) -> None:
    stored, planned = type(config).from_dict(read_config(folder).get("run", {})).to_dict(), config.to_dict()
    other = [name for name in planned if name not in FREE and planned[name] != stored[name]]
    if other:
        was = ", ".join(f"{name}={stored[name]!r} (now {planned[name]!r})" for name in other)
        raise ValueError(f"{folder}: a run with other settings is there: {was}; give another --out")


def _summary(record: Record) -> str:
    if record["status"] != "done":
        return f"FAILED: {record['error']}"
    _, shown, factor, form, label = SHOWN[record["task"]]
    valid, test = (factor * record[split][shown] for split in ("valid", "test"))
    return f"{label} valid {valid:{form}}, test {test:{form}} ({record['elapsed_s']:.0f} s)"
