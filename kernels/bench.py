"""Every op against its rivals, side by side: `python -m grassland.kernels.bench plucker` (or `all`).

Every rival that installs here or on a GPU takes part, and one that cannot run is listed with the reason. Results are
compared before anything is timed. Each repetition runs every rival once, in turn; medians are compared, never times of
different runs.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import importlib
import itertools
import json
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bench_report, dispatch
from .machine import about
from .rival import Benchmark, Disagreement, Rival, Setting, Step, Unavailable, summary, tensors, without_check

# A millisecond of a GPU at 2 GHz, and more than its cache holds.
WAIT_CYCLES, SCRATCH_BYTES = 2_000_000, 1 << 28
# Seconds after which a rival stops repeating, and of a set-up that is worth a line.
PATIENCE, SLOW = 8.0, 5.0
# Parameters of glibc's mallopt.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def build(
    benchmark: Benchmark, setting: Setting, dtype: torch.dtype, device: torch.device, setup_limit: float = 0.0
) -> tuple[dict, dict]:
    """The rivals' functions, and the reasons of those that cannot run. setup_limit: seconds, 0 for none."""
    # Else compiled rivals leave sizes open at their second setting, which takes minutes, and later fall back to eager.
    torch.compiler.reset()
    steps, reasons = {}, {}
    for rival in benchmark.rivals:
        start = time.perf_counter()
        late: list[str] = []
        try:
            # Inputs are drawn there. Compilers wrap what is raised inside them, or go on without.
            with device, interrupted(0.0 if rival.name == benchmark.ours else setup_limit, late):
                steps[rival.name] = tried(rival, setting.values, dtype, device)
        except Exception as error:
            if not late and not isinstance(error, Unavailable | dispatch.BackendError):
                raise
            reasons[rival.name] = str(error)
        if late:
            steps.pop(rival.name, None)
            reasons[rival.name] = late[0]
        if (seconds := time.perf_counter() - start) > SLOW:
            print(f"{rival.name} took {seconds:.0f} s to set up", file=sys.stderr)
    return steps, reasons


@contextmanager
def interrupted(seconds: float, late: list[str]) -> Iterator[None]:
    """Unavailable after so many seconds, and the reason in `late`; 0 for never. Never, too, where there is no alarm."""
    if not seconds or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        late.append(f"not set up within {seconds:g} s")
        raise Unavailable(late[0])

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(rival: Rival, values: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """The rival's functions; those of a foreign one have run twice, for many packages fail only then."""
    if not rival.foreign:
        return rival.build(values, dtype, device)
    try:
        modes = rival.build(values, dtype, device)
        for step in 2 * list(without_check(modes).values()):
            step()
        return modes
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(f"fails with {summary(error)}") from error


def disagreement(found: Any, expected: Any) -> float:
    """Largest relative difference, in the Euclidean norm, of corresponding tensors."""
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item() for a, b in pairs)


def agreement(benchmark: Benchmark, steps: dict[str, dict[str, Step]], dtype: torch.dtype) -> dict[str, str]:
    """Disagreement if results differ; foreign rivals whose results do are returned, with the reason."""
    foreign = {rival.name for rival in benchmark.rivals if rival.foreign}
    reasons: dict[str, str] = {}
    ours = steps.get(benchmark.ours, {}).get("check")
    expected = ours() if ours else None
    for name, modes in steps.items():
        other = f"{name} in float64" if "truth" in modes else benchmark.ours
        if "check" not in modes or other == name or (other == benchmark.ours and expected is None):
            continue
        difference = disagreement(modes["check"](), modes["truth"]() if "truth" in modes else expected)
        if difference <= benchmark.tolerance[dtype]:
            continue
        if name not in foreign:
            raise Disagreement(f"{benchmark.name}: {name} and {other} differ by {difference:.1e}")
        reasons[name] = f"differs from {other} by {difference:.1e}"
    return reasons


def elapsed(step: Step, device: torch.device) -> float:
    """Seconds of one call; on a GPU those of its stream, which starts with a cold cache, after a millisecond of waiting
    in which the host gets ahead."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT_CYCLES)
    scratch(device).zero_()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def scratch(device: torch.device) -> Tensor:
    """What is written between calls, larger than a GPU's cache."""
    return torch.empty(SCRATCH_BYTES, dtype=torch.int8, device=device)


def recorded(step: Step) -> Step | None:
    """The call as a CUDA graph, which has no launches to wait for; None if it cannot be recorded."""
    aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(aside):
            for _ in range(2):
                step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            kept = step()  # noqa: F841 (what a graph writes lives as long as it does)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # whatever a rival does that a graph cannot hold; it is timed as it is
        print(f"not recorded: {summary(error)}", file=sys.stderr)
        # A recording that fails leaves its stream in use.
        torch.cuda.set_stream(torch.cuda.default_stream())
        return None
    return graph.replay


def host_seconds(step: Step) -> float:
    """Median time until a call returns that a GPU has still to carry out."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def interleaved(steps: dict[str, Step], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition, the rivals taking turns; two warm-up rounds are thrown away. A rival that has taken
    very long repeats no more, and may have one round to warm up and one that counts."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            if len(times[name]) < 2 or sum(times[name]) < PATIENCE:
                times[name].append(elapsed(step, device))
    return {name: seconds[min(2, len(seconds) - 1) :] for name, seconds in times.items()}


def by_kernel(step: Step, calls: int = 5) -> list[tuple[str, float, float]]:
    """(name, launches, microseconds) of what one call runs on a GPU, what takes longest first; the cache is warm."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    seen: dict[str, list[float]] = {}
    for event in profile.events() or ():
        if str(event.device_type).endswith("CUDA"):
            seen.setdefault(event.name, []).append(event.time_range.elapsed_us())
    found = [(name, len(times) / calls, round(sum(times) / calls, 2)) for name, times in seen.items()]
    return sorted(found, key=lambda kernel: -kernel[2])


def saved_bytes(step: Step) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters and inputs included."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def peak_bytes(step: Step, device: torch.device) -> int:
    """Peak memory of one call above what was there before."""
    if device.type != "cuda":
        return cpu_peak_bytes(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak_bytes(step: Step) -> int:
    """From the allocator's events, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def measure(benchmark: Benchmark, setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each rival and mode."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    steps, reasons = build(benchmark, setting, dtype, device, options.setup_limit)
    wrong = agreement(benchmark, steps, dtype)
    reasons |= wrong
    steps = {name: modes for name, modes in steps.items() if name not in wrong}
    common = {"bench": benchmark.name, "setting": setting.id, **setting.values, "dtype": options.dtype}
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
                record["graph"] = graphs.get(name) is not None
                # Without a graph the host's time is in `ms`.
                record |= {"host_ms": host_seconds(chosen[name]) * 1e3} if record["graph"] else {}
                if name == benchmark.ours:
                    record["kernels"] = by_kernel(graphs.get(name) or chosen[name])
            if "forward" in mode and "backward" in mode:
                record["saved_bytes"] = saved_bytes(chosen[name])
            records.append({**common, **record})
    return records


def peaks(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """What this machine does at best: GFLOP/s of a large matrix product, and GB/s of a copy, read and written."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(1 << (30 if device.type == "cuda" else 26), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"multiply": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, 5)
    multiply, copy = min(times["multiply"]), min(times["copy"])
    return {"peak_gflops": 2 * side**3 / multiply / 1e9, "peak_gbytes": 2 * source.nbytes / copy / 1e9}


# The size that --scaling varies: the setting it starts from, its name and its values.
SCALING: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "plucker": ("B1 L2048", "length", (256, 512, 1024, 2048, 4096)),
    "kronecker": ("2x1024 C384", "streams", (2, 4, 8)),
    "subspace": ("step n=384", "classes", (100, 1000, 10000)),
    "moe": ("T788 E4", "experts", (2, 4, 8, 16)),
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
            records += [{**record, **facts} for record in measure(benchmark, setting, options)]
            print(f"{benchmark.name}, {setting.id}: done", file=sys.stderr)
        except Disagreement as error:
            failed.append(f"error: {setting.id}: {error}: nothing was timed")
        if options.out and records:  # what comes later may fail, or never end
            write(records, benchmark, options)
    if records:
        print(f"{benchmark.title}\n\n{bench_report.table(records, benchmark.ours)}\n\n{json.dumps(facts)}\n")
    return records, failed


def write(records: Sequence[dict[str, Any]], benchmark: Benchmark, options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"{benchmark.name}-{options.device}-{options.dtype}{'-scaling' if options.scaling else ''}"
    (options.out / f"{stem}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ours, title = benchmark.ours, benchmark.title
    if options.scaling:
        bench_report.scaling(records, ours, title, SCALING[benchmark.name][1], options.out / f"{stem}.png")
        return
    bench_report.bars(records, ours, title, options.out / f"{stem}.png")
    bench_report.roofline(records, ours, title, options.out / f"{stem}-roofline.png")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if not options.default_malloc:
        keep_freed_memory()
    ops = dispatch.PACKAGES if options.op == "all" else [options.op]
    benchmarks: list[Benchmark] = [importlib.import_module(f"{__package__}.{op}.rivals").BENCHMARK for op in ops]
    settings = {benchmark.name: chosen_settings(benchmark, options) for benchmark in benchmarks}
    benchmarks = [narrowed(benchmark, options.rival) for benchmark in benchmarks]
    if not any(settings.values()):
        names = ", ".join(s.id for b in benchmarks for s in all_settings(b, options))
        raise SystemExit(f"error: --setting must be one of {names}, got {', '.join(options.setting)}")
    try:
        baseline = bench_report.read_baseline(options.baseline) if options.baseline else []
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
        compare(records, baseline)
    return records


def compare(records: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> None:
    """SystemExit with 1 if there are regressions, each on a line."""
    try:
        lines = bench_report.regressions(records, baseline)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print("\n".join(lines) or "no regression against the baseline")
    if lines:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
