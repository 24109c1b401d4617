"""Every op against its rivals, side by side: `python -m grassland.kernels.bench plucker` (or `all`).

Every rival that installs here or on a GPU takes part, and one that cannot run is listed with the reason. Results are
compared before anything is timed. Each repetition runs every rival once, in turn; medians are compared, never times of
different runs.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import dispatch
from ..machine import about
from . import report
from .rival import Benchmark, Disagreement, Setting, Step, Unavailable, packages
from .setup import agreement, build
from .timing import by_kernel, host_seconds, interleaved, peak_bytes, peaks, recorded, saved_bytes

# Parameters of glibc's mallopt.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def measure(benchmark: Benchmark, setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each rival and mode."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    steps, reasons = build(benchmark, setting, dtype, device, options.setup_limit)
    wrong = agreement(benchmark, steps, dtype)
    reasons |= wrong
    steps = {name: modes for name, modes in steps.items() if name not in wrong}
    if benchmark.ours not in steps:
        raise Unavailable(f"{benchmark.name}: {benchmark.ours}: {reasons[benchmark.ours]}")
    common = {"bench": benchmark.name, "setting": setting.id, **setting.values}
    common |= {"dtype": options.dtype, "device": device.type}
    records = [{**common, "rival": name, "error": reason} for name, reason in reasons.items()]
    for mode in [mode for mode in steps[benchmark.ours] if mode not in ("check", "truth")]:
        chosen = {name: modes[mode] for name, modes in steps.items() if mode in modes}
        graphs = {}
        if device.type == "cuda":
            able = [rival.name for rival in benchmark.rivals if rival.name in chosen and rival.recordable]
            graphs = {name: recorded(chosen[name]) for name in able}
        times = interleaved({name: graphs.get(name) or step for name, step in chosen.items()}, device, options.repeats)
        ours = statistics.median(times[benchmark.ours])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            record = {"rival": name, "mode": mode, "ms": median * 1e3, "min_ms": min(seconds) * 1e3}
            record |= {"ratio": median / ours, "gflops": benchmark.flops(setting.values, mode) / median / 1e9}
            record |= {"gbytes": benchmark.moved(setting.values, mode, dtype.itemsize) / median / 1e9}
            record |= {"peak_bytes": peak_bytes(chosen[name], device)}
            if device.type == "cuda":
                record |= on_the_device(chosen[name], graphs.get(name), name == benchmark.ours)
            if "forward" in mode and "backward" in mode:
                record["saved_bytes"] = saved_bytes(chosen[name])
            records.append({**common, **record})
    return records


def on_the_device(step: Step, graph: Step | None, ours: bool) -> dict[str, Any]:
    """What else is known of a call on a GPU."""
    record: dict[str, Any] = {"graph": graph is not None}
    if graph is not None:  # else the host's time is in `ms`
        record["host_ms"] = host_seconds(step) * 1e3
    if ours:
        record["kernels"] = by_kernel(graph or step)
    return record


# The size that --scaling varies: the setting it starts from, its name and its values.
SCALING: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "plucker": ("B1 L2048", "length", (256, 512, 1024, 2048, 4096)),
    "kronecker": ("2x1024 C384", "streams", (2, 4, 8)),
    "subspace": ("step n=384", "classes", (100, 1000, 10000)),
    "moe": ("T788 E4", "experts", (2, 4, 8, 16)),
    "cross_entropy": ("T1024 V30522 C256", "vocab", (1000, 10000, 100000)),
}


def scaled(benchmark: Benchmark) -> list[Setting]:
    """The settings of --scaling."""
    start, name, sizes = SCALING[benchmark.name]
    base = next((s for s in benchmark.settings if s.id == start), benchmark.settings[0])
    return [Setting(f"{base.id}, {name} {size}", {**base.values, name: size}) for size in sizes]


def keep_freed_memory() -> None:
    """Make glibc's malloc reuse large blocks for all rivals alike.

    By default it returns them to the system, which then clears new pages inside the timed calls: for outputs of 25 MB
    that takes as long as the kernels, now and then.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_MAX, 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m grassland.kernels.bench", description=__doc__)
    parser.add_argument("op", choices=[*dispatch.PACKAGES, "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--setting", action="append", help="only this setting (repeatable)")
    parser.add_argument("--rival", action="append", help="only this rival beside grassland (repeatable)")
    parser.add_argument(
        "--scaling", action="store_true", help="vary sequence length, streams, experts or classes instead"
    )
    parser.add_argument(
        "--baseline", type=Path, help="a stored JSONL; exit code 1 if a lead over a rival has shrunk by 15 %% or more"
    )
    parser.add_argument(
        "--default-malloc", action="store_true", help="on a CPU, leave it to malloc which freed memory it keeps"
    )
    parser.add_argument(
        "--setup-limit",
        type=float,
        default=0.0,
        help="seconds after which a rival that is still setting up is left out",
    )
    parser.add_argument("--out", type=Path, help="folder for the JSONL and the pictures; nothing is written without it")
    return parser.parse_args(arguments)


def all_settings(benchmark: Benchmark, options: argparse.Namespace) -> Sequence[Setting]:
    return scaled(benchmark) if options.scaling else benchmark.settings_on(torch.device(options.device))


def chosen_settings(benchmark: Benchmark, options: argparse.Namespace) -> list[Setting]:
    return [s for s in all_settings(benchmark, options) if not options.setting or s.id in options.setting]


def narrowed(benchmark: Benchmark, names: Sequence[str] | None) -> Benchmark:
    """With these rivals alone, and ours; SystemExit for a name that it has not."""
    known = [rival.name for rival in benchmark.rivals]
    if unknown := [name for name in names or () if name not in known]:
        raise SystemExit(f"error: --rival must be one of {', '.join(known)}, got {', '.join(unknown)}")
    kept = [rival for rival in benchmark.rivals if not names or rival.name in (*names, benchmark.ours)]
    return dataclasses.replace(benchmark, rivals=kept)


def run(
    benchmark: Benchmark, settings: Sequence[Setting], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure, print and, with --out, write one op's records and pictures; the settings in which rivals disagree come
    second, with the reason."""
    facts = about() | peaks(getattr(torch, options.dtype), torch.device(options.device))
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    for setting in settings:
        try:
            measured = measure(benchmark, setting, options)
            facts["packages"] = packages()  # of the rivals, which the first setting imports
            records += [{**record, **facts} for record in measured]
            print(f"{benchmark.name}, {setting.id}: done", file=sys.stderr)
        except (Disagreement, Unavailable, dispatch.BackendError) as error:
            failed.append(f"error: {setting.id}: {error}: nothing was timed")
        if options.out and records:  # what comes later may fail, or never end
            write(records, benchmark, options)
    if records:
        print(f"{benchmark.title}\n\n{report.table(records, benchmark.ours)}\n\n{json.dumps(facts)}\n")
    return records, failed


def write(records: Sequence[dict[str, Any]], benchmark: Benchmark, options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"{benchmark.name}-{options.device}-{options.dtype}{'-scaling' if options.scaling else ''}"
    (options.out / f"{stem}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ours, title = benchmark.ours, benchmark.title
    if options.scaling:
        report.scaling(records, ours, title, SCALING[benchmark.name][1], options.out / f"{stem}.png")
        return
    report.bars(records, ours, title, options.out / f"{stem}.png")
    report.roofline(records, ours, title, options.out / f"{stem}-roofline.png")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    if os.environ.get(dispatch.ENVIRONMENT):
        raise SystemExit(f"error: unset ${dispatch.ENVIRONMENT}: what is timed as ours would be that backend")
    torch.set_num_threads(options.threads)
    if not options.default_malloc:
        keep_freed_memory()
    ops = dispatch.PACKAGES if options.op == "all" else [options.op]
    benchmarks: list[Benchmark] = [importlib.import_module(f"{__package__}.{op}").BENCHMARK for op in ops]
    settings = {benchmark.name: chosen_settings(benchmark, options) for benchmark in benchmarks}
    benchmarks = [narrowed(benchmark, options.rival) for benchmark in benchmarks]
    if not any(settings.values()):
        names = ", ".join(s.id for b in benchmarks for s in all_settings(b, options))
        raise SystemExit(f"error: --setting must be one of {names}, got {', '.join(options.setting)}")
    try:
        baseline = report.read_baseline(options.baseline) if options.baseline else []
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    records, failed = [], []
    for benchmark in benchmarks:
        found, wrong = run(benchmark, settings[benchmark.name], options) if settings[benchmark.name] else ([], [])
        records += found
        failed += wrong
    if failed:
        raise SystemExit("\n".join(failed))
    if options.baseline:
        compare(records, baseline, {benchmark.ours for benchmark in benchmarks})
    return records


def compare(records: list[dict[str, Any]], baseline: list[dict[str, Any]], ours: set[str]) -> None:
    """SystemExit with 1 if there are regressions, each on a line, after what has not been compared."""
    print("".join(f"{line}\n" for line in report.uncompared(records, baseline, ours)), end="")
    try:
        lines = report.regressions(records, baseline, ours)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print("\n".join(lines) or "no regression against the baseline")
    if lines:
        raise SystemExit(1)
