"""What one call takes: seconds on a CPU or of a GPU's stream, of its host, by kernel, and bytes."""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from .rival import Step, summary

# A millisecond of a GPU at 2 GHz, and more than its cache holds.
WAIT_CYCLES, SCRATCH_BYTES = 2_000_000, 1 << 28
# Seconds after which a rival stops repeating.
PATIENCE = 8.0


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
    """Bytes that autograd keeps between forward and backward, each storage once, parameters and inputs included.

    0 for a function that hides from autograd's hooks what it keeps.
    """
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


def peaks(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """What this machine does at best: GFLOP/s of a large matrix product, and GB/s of a copy, read and written."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(1 << (30 if device.type == "cuda" else 26), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"multiply": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, 5)
    multiply, copy = min(times["multiply"]), min(times["copy"])
    return {"peak_gflops": 2 * side**3 / multiply / 1e9, "peak_gbytes": 2 * source.nbytes / copy / 1e9}
