"""What a run says: metrics.jsonl, the live progress line, TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .optional import optional

METRICS_FILE = "metrics.jsonl"
# Steps of a process that are not timed: allocation, compilation and caches make them slow.
UNTIMED_STEPS = 3


def to_json(value: Any, **layout: Any) -> str:
    """`json.dumps`, with null for numbers that are not finite: JSON has none."""
    return json.dumps(_finite(value), allow_nan=False, **layout)


def nulls_as_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as they were before `to_json`, but for infinities."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """metrics.jsonl of a run: one JSON object an event, appended as it happens."""

    def __init__(self, folder: Path, offset: int | None = None, tensorboard: bool = False) -> None:
        """offset: keep only so many bytes of an existing file, the events up to a checkpoint."""
        self.path = folder / METRICS_FILE
        if offset is not None and self.path.exists():
            os.truncate(self.path, _whole_lines(self.path, offset))
        # Unbuffered: an event that met a full disk must not be written again when the file is closed.
        self._file = self.path.open("ab", buffering=0)
        self._tensorboard: Any = None
        if tensorboard:
            writers = optional("torch.utils.tensorboard", "train", "tensorboard")
            self._tensorboard = writers.SummaryWriter(str(folder))

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append {"event": event, "step": step, **values}."""
        self._file.write((to_json({"event": event, "step": step, **values}) + "\n").encode())
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._tensorboard.add_scalar(f"{event}/{name}", value, step)

    def offset(self) -> int:
        """The size of the file, once all of it is on disk."""
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class NoLog(MetricsLog):
    """The log of a process that writes none."""

    def __init__(self) -> None:
        """Open nothing."""

    def write(self, event: str, step: int, **values: Any) -> None:
        """Nothing."""

    def offset(self) -> int:
        """Nothing is written."""
        return 0

    def close(self) -> None:
        """Nothing is open."""


def _whole_lines(path: Path, limit: int) -> int:
    """The bytes of the whole lines among the first `limit`: a damaged disk may have cut the last one."""
    with path.open("rb") as file:
        return file.read(limit).rfind(b"\n") + 1


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, without a last line that was cut short; metrics that were not finite are NaN.
    FileNotFoundError names a missing file."""
    path = folder / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    events = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(event, dict) or not {"event", "step"} <= event.keys():
            raise ValueError(f"{path}: line {number} is no event of a run")
        events.append(nulls_as_nan(event) if event["event"] in ("valid", "test") else event)
    return events


class Meter:
    """Steps a second of training alone: what happens while paused, and the first steps of a process, do not count."""

    def __init__(self) -> None:
        self._warm = 0
        self._started = time.perf_counter()
        self.window = [0, 0.0]
        self.total = [0, 0.0]

    def step(self) -> None:
        """Count a step."""
        self._warm += 1
        if self._warm <= UNTIMED_STEPS:
            self._started = time.perf_counter()
        else:
            self.window[0] += 1

    def pause(self) -> None:
        """Stop the clock; call it when the device has finished."""
        if self._warm > UNTIMED_STEPS:
            self.window[1] += time.perf_counter() - self._started

    def go_on(self) -> None:
        """Start the clock again."""
        self._started = time.perf_counter()

    def take(self) -> float | None:
        """Steps a second since the last call, or None if none has been timed. Call it while paused."""
        steps, seconds = self.window
        self.total = [self.total[0] + steps, self.total[1] + seconds]
        self.window = [0, 0.0]
        return steps / seconds if steps and seconds > 0 else None

    def average(self) -> float | None:
        """Steps a second over all that `take` has returned."""
        return self.total[0] / self.total[1] if self.total[1] > 0 else None


class ProgressLine:
    """One line that is rewritten on a terminal, and a line each time elsewhere."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._live = sys.stdout.isatty()
        self._open = False

    def update(self, text: str) -> None:
        """Show where the run is."""
        if self._silent:
            return
        if self._live:
            print(f"\r\x1b[2K{text}", end="", flush=True)
            self._open = True
        else:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._silent:
            return
        if self._open:
            print()
            self._open = False
        print(text, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
