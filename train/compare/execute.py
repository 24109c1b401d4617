"""Running what a comparison still lacks, each run in a process of its own."""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from ...archs import read_config
from ..checkpoint import has_state
from ..config import RunConfig
from ..lock import check_free
from ..start import AUTO
from .options import changed
from .plan import FREE, Comparison
from .results import Record, Selection, alone, done, is_diverged, is_done, mark, outcome, select, summary, unselected

# Of an arm alone: the median of windows is what a machine does while nothing else disturbs it. One more goes before
# them, whose first steps are not timed.
WINDOWS, WINDOW_STEPS = 6, 10

# Imported once, in the process from which the runs are forked: several seconds that a run need not spend.
PRELOADED = ["grassland.train.start", "grassland.train.tasks.lm", "grassland.train.tasks.vision", "matplotlib.figure"]
PRELOADED += ["timm", "torchvision", "sklearn.datasets"]


class Run(NamedTuple):
    """One cell of the grid."""

    arm: str
    lr: float
    seed: int


class Runner:
    """The runs of a comparison in `folder`/ARM/lrLR-seedSEED, each with its log beside it.

    A finished run is taken as it is, an interrupted one is resumed, one that failed is tried again. context: what
    `processes` gives; None to run nothing. jobs: how many run at a time. widen: how often a grid is widened.

    Raises ValueError if a run in the folder has other settings than planned, or is still going on.
    """

    def __init__(self, plan: Comparison, folder: Path, context: Any, jobs: int = 1, widen: int = 0) -> None:
        self.plan, self.folder, self.context, self.jobs, self.widen = plan, folder, context, jobs, widen
        self.finished: list[Record] = []
        # Before anything is run, for hours perhaps.
        for arm, lr in itertools.product(plan.arms, plan.lrs):
            planned = {self._place(Run(arm, lr, seed)): plan.config(arm, lr, seed) for seed in plan.seeds}
            for folder, config in {**planned, self._place_alone(arm, lr): self._config_alone(arm, lr)}.items():
                if context is not None:
                    check_free(folder)
                _is_done_as(folder, config)

    def records(self) -> list[Record]:
        """One record a run: the grid with the first seed, wider where an arm is best at an end of it, then the other
        seeds at each arm's best learning rate.

        Raises ValueError if a run of a wider grid is there with other settings than planned.
        """
        plan, (first, *others) = self.plan, self.plan.seeds
        if len(plan.lrs) == 1:  # nothing to choose
            self._round(Run(arm, plan.lrs[0], seed) for seed in plan.seeds for arm in plan.arms)
            chosen = unselected(self.finished)
        else:
            self._round(Run(arm, lr, first) for lr in plan.lrs for arm in plan.arms)
            self._widen(first)
            chosen = select(self.finished, first)
            self._round(Run(arm, chosen[arm].lr, seed) for seed in others for arm in plan.arms if arm in chosen)
        mark(self.finished, chosen)
        self._alone(chosen)
        return self.finished

    def _widen(self, seed: int) -> None:
        for _ in range(self.widen):
            beyond = {arm: selection.beyond for arm, selection in select(self.finished, seed).items()}
            wider = [Run(arm, lr, seed) for arm in self.plan.arms if (lr := beyond.get(arm)) is not None]
            # A run that was killed has told nothing of its rate, and is not run twice.
            seen = {Run(record["arm"], record["lr"], record["seed"]) for record in self.finished}
            runs = [run for run in wider if run not in seen and self._is_worth(run)]
            if not runs:
                return
            self._round(runs)

    def _is_worth(self, run: Run) -> bool:
        """Whether it will tell something of its rate: where nothing is run, only what has been can."""
        folder = self._place(run)
        return self.context is not None or is_done(folder) or is_diverged(folder)

    def _round(self, runs: Iterable[Run]) -> None:
        """Carry out these runs and add their records in this order; each is printed as soon as it is there."""
        waiting, records, active = list(runs), dict[Run, Record](), dict[int, tuple[Run, Any]]()
        order = list(waiting)
        with _ended(active):
            while waiting or active:
                while waiting and len(active) < self.jobs:
                    run = waiting.pop(0)
                    process = self._process(run)
                    if process is None:
                        self._note(run, records)
                    else:
                        process.start()
                        active[process.sentinel] = run, process
                # With nothing to wait for it would wait for ever.
                for sentinel in multiprocessing.connection.wait(list(active)) if active else ():
                    run, process = active.pop(sentinel)  # type: ignore[call-overload]
                    process.join()
                    self._note(run, records, process.exitcode)
        self.finished += [records[run] for run in order]

    def _note(self, run: Run, records: dict[Run, Record], exitcode: int | None = None) -> None:
        records[run] = self._record(run, exitcode)
        name = f"{self.plan.name}/{run.arm} lr {run.lr:g} seed {run.seed}"
        print(f"{name}: {summary(records[run])}", flush=True)

    def _record(self, run: Run, exitcode: int | None) -> Record:
        plan, folder = self.plan, self._place(run)
        about = {"comparison": plan.name, "title": plan.title, "note": plan.note, "task": plan.task, "arm": run.arm}
        about |= {"lr": run.lr, "seed": run.seed, "differs": plan.differing()[run.arm]}
        if is_done(folder):
            return {**about, "status": "done", "shared": _shared(folder).exists(), **outcome(folder, plan.task)}
        if self.context is None:
            reason = "diverged" if is_diverged(folder) else "interrupted" if has_state(folder) else "not run"
        else:
            log = _log(folder)
            lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            reason = f"{lines[-1] if lines else 'no output'} (exit code {exitcode}, {log})"
        return {**about, "status": "failed", "error": reason, "diverged": is_diverged(folder)}

    def _place(self, run: Run) -> Path:
        return self.folder / run.arm / f"lr{run.lr:g}-seed{run.seed}"

    def _place_alone(self, arm: str, lr: float) -> Path:
        return self.folder / arm / f"alone-lr{lr:g}"

    def _config_alone(self, arm: str, lr: float) -> RunConfig:
        # One seed for all: speed does not depend on it.
        return in_short(self.plan.config(arm, lr, 0), str(self._place_alone(arm, lr)))

    def _process(self, run: Run) -> Any:
        """A process that carries the run out; None if it is done, or nothing shall run."""
        config, folder = self.plan.config(*run), self._place(run)
        if _is_done_as(folder, config) or self.context is None:
            return None
        if self.jobs > 1:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _shared(folder).touch()
        placed = replace(config, out=str(folder), resume=AUTO)
        # Threads of several runs on the same cores wait for each other: two runs of two spent 95 % of the time on it.
        threads = max(1, torch.get_num_threads() // self.jobs) if self.jobs > 1 else None
        return self.context.Process(target=train, args=(placed, _log(folder), False, threads))

    def _alone(self, chosen: Mapping[str, Selection]) -> None:
        """Give the chosen runs of every arm its rate with nothing beside it, measured if any of them shared the device,
        now or in an earlier call."""
        shared = self.jobs > 1 or any(record["shared"] for record in done(self.finished) if record["chosen"])
        for arm, selection in chosen.items():
            folder, name = self._place_alone(arm, selection.lr), f"{self.plan.name}/{arm} alone"
            config = self._config_alone(arm, selection.lr)
            if not _is_done_as(folder, config) and self.context is not None and shared:
                process = self.context.Process(target=train, args=(config, _log(folder), True))
                with _ended({0: (Run(arm, selection.lr, 0), process)}):
                    process.start()
                    process.join()
                if not is_done(folder):
                    print(f"{name}: FAILED (exit code {process.exitcode}, {_log(folder)})", flush=True)
            if is_done(folder):
                rate = alone(folder, self.plan.task)
                print(f"{name}: {rate['units_per_s']:,.0f} a second", flush=True)
                for record in done(self.finished):
                    if record["arm"] == arm and record["chosen"]:
                        record["alone"] = rate


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _shared(folder: Path) -> Path:
    """What lies beside the folder of a run that had others beside it, so that its throughput is not its own."""
    return folder.with_name(f"{folder.name}.shared")


def in_short(config: RunConfig, out: str) -> RunConfig:
    """The run of as many steps as it takes to time them."""
    steps = (1 + WINDOWS) * WINDOW_STEPS
    short = changed(config, {"steps": steps, "warmup": 0, "eval_every": 0, "save_every": 0})
    return replace(short, out=out, resume=AUTO, log_every=WINDOW_STEPS)


def train(config: RunConfig, log: Path, timed: bool = False, threads: int | None = None) -> None:
    """One run, in a process of its own, which saves and ends if the comparison's is killed; what it prints goes to
    `log`. timed: nothing is judged, to save the time. threads: of PyTorch, by default as many as it takes."""
    if threads is not None:
        torch.set_num_threads(threads)
    threading.Thread(target=_follow_parent, daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
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

    class Unjudged(Task):  # type: ignore[misc, valid-type]
        def evaluate(self, model: Any, split: str) -> dict[str, float]:
            return {self.metric: 0.0}

    try:
        code = run(Unjudged if timed else Task, config)  # type: ignore[arg-type]
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def processes() -> Any:
    """A multiprocessing context whose processes are forked from one that has imported what runs need, where it is
    installed, and has used none of it; where there is no fork, they are new ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@contextmanager
def _ended(active: Mapping[int, tuple[Run, Any]]) -> Iterator[None]:
    """See the processes end that are in `active`, also when this one is asked to stop or fails: then the runs save
    themselves first."""

    def terminate() -> None:
        for _, process in active.values():
            process.terminate()

    def stop(number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the runs by itself.
        terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Exception:
        terminate()
        raise
    finally:
        for _, process in active.values():
            process.join()
        signal.signal(signal.SIGTERM, before)


def _is_done_as(folder: Path, config: RunConfig) -> bool:
    """Whether a run got to its end; ValueError if one with other settings is there."""
    ended = is_done(folder)
    if ended or has_state(folder):
        _check_same(folder, config)
    return ended


def _check_same(folder: Path, config: RunConfig) -> None:
    stored, planned = type(config).from_dict(read_config(folder).get("run", {})).to_dict(), config.to_dict()
    other = [name for name in planned if name not in FREE and planned[name] != stored[name]]
    if other:
        was = ", ".join(f"{name}={stored[name]!r} (now {planned[name]!r})" for name in other)
        raise ValueError(f"{folder}: a run with other settings is there: {was}; give another --out")
