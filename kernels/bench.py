"""Every op against its rivals, side by side: `python -m grassland.kernels.bench plucker`.

Each repetition runs every rival once, in turn; medians are compared, never times of different runs. Rivals that cannot
run are listed with the reason. Before anything is timed, the results of the rivals are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .machine import about

Step = Callable[[], Any]
# Parameters of glibc's mallopt.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


class Unavailable(Exception):
    """A rival cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """One problem size, or what else a table has a row for."""

    id: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Rival:
    """One way to do the work.

    build(setting values, dtype, device) gives a function for each mode it has ("forward", "forward+backward", "step",
    …), none if the setting is not for it, and, as "check", one whose result (a tensor, or a tuple of them) must agree
    with the other rivals', or with that of the function it gives as "truth": the same mathematics in float64. Builders
    raise Unavailable.
    """

    name: str
    build: Callable[[dict[str, Any], torch.dtype, torch.device], dict[str, Step]]


@dataclass(frozen=True)
class Benchmark:
    """What is measured for one op.

    ours: the rival that the ratios are of. flops and moved: arithmetic and bytes that mode cannot do without, for the
    roof. tolerance: largest relative difference of the checked results, by dtype.
    """

    name: str
    title: str
    ours: str
    settings: Sequence[Setting]
    rivals: Sequence[Rival]
    flops: Callable[[dict[str, Any], str], float]
    moved: Callable[[dict[str, Any], str, int], float]
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: {torch.float32: 1e-4, torch.bfloat16: 3e-2})


def with_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], truth: Callable[..., Any] | None = None
) -> dict[str, Step]:
    """The modes of a differentiable function of one or more outputs: `inputs` that require gradients get them.

    truth: the same mathematics in float64, called with the inputs in float64.
    """
    wanted = [t for t in inputs if t.requires_grad]
    generator = torch.Generator().manual_seed(7)
    outputs = tensors(function(*inputs))
    grads = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]

    def forward() -> Any:
        with torch.no_grad():
            return function(*inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), wanted, grads)

    modes: dict[str, Step] = {"forward": forward, "forward+backward": both}
    modes["check"] = lambda: (*tensors(forward()), *both())
    if truth is not None:
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        modes["truth"] = lambda: with_gradients(truth, wide)["check"]()
    return modes


def build(benchmark: Benchmark, setting: Setting, dtype: torch.dtype, device: torch.device) -> tuple[dict, dict]:
    """The rivals' functions, and the reasons of those that cannot run."""
    steps, reasons = {}, {}
    for rival in benchmark.rivals:
        try:
            steps[rival.name] = rival.build(setting.values, dtype, device)
        except (Unavailable, dispatch.BackendError) as error:
            reasons[rival.name] = str(error)
    return steps, reasons


def disagreement(found: Any, expected: Any) -> float:
    """Largest relative difference, in the Euclidean norm, of corresponding tensors."""
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item() for a, b in pairs)


def tensors(value: Any) -> list[Tensor]:
    return [value.detach()] if isinstance(value, Tensor) else [t.detach() for t in value]


def agreement(benchmark: Benchmark, steps: dict[str, dict[str, Step]], dtype: torch.dtype) -> None:
    ours = steps.get(benchmark.ours, {}).get("check")
    expected = ours() if ours else None
    for name, modes in steps.items():
        other = f"{name} in float64" if "truth" in modes else benchmark.ours
        if "check" not in modes or other == name or (other == benchmark.ours and expected is None):
            continue
        difference = disagreement(modes["check"](), modes["truth"]() if "truth" in modes else expected)
        if not difference <= benchmark.tolerance[dtype]:
            raise SystemExit(f"error: {name} and {other} differ by {difference:.1e}: nothing was timed")


def elapsed(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(steps: dict[str, Step], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition, the rivals taking turns; two warm-up rounds are thrown away."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            times[name].append(elapsed(step, device))
    return {name: seconds[2:] for name, seconds in times.items()}


def saved_bytes(step: Step) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters and inputs included."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Peak device memory of one call above what was there before; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(benchmark: Benchmark, setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each rival and mode."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    steps, reasons = build(benchmark, setting, dtype, device)
    agreement(benchmark, steps, dtype)
    common = {"bench": benchmark.name, "setting": setting.id, **setting.values, "dtype": options.dtype}
    records = [{**common, "rival": name, "error": reason} for name, reason in reasons.items()]
    for mode in [mode for mode in steps[benchmark.ours] if mode not in ("check", "truth")]:
        chosen = {name: modes[mode] for name, modes in steps.items() if mode in modes}
        times = interleaved(chosen, device, options.repeats)
        ours = statistics.median(times[benchmark.ours])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            record = {"rival": name, "mode": mode, "ms": median * 1e3, "min_ms": min(seconds) * 1e3}
            record |= {"ratio": median / ours, "gflops": benchmark.flops(setting.values, mode) / median / 1e9}
            record |= {"gbytes": benchmark.moved(setting.values, mode, dtype.itemsize) / median / 1e9}
            record |= {"peak_bytes": peak_bytes(chosen[name], device)}
            if "backward" in mode:
                record["saved_bytes"] = saved_bytes(chosen[name])
            records.append({**common, **record})
    return records


def table(records: Sequence[dict[str, Any]], ours: str) -> str:
    """Markdown: one row a rival, its time over ours in every setting."""
    lines = [
        f"| setting | mode | rival | ms | time / {ours} | GFLOP/s | GB/s | saved MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        if "error" in r:
            lines.append(f"| {r['setting']} | | {r['rival']} | not run: {r['error']} | | | | |")
            continue
        saved = f"{r['saved_bytes'] / 1e6:.1f}" if "saved_bytes" in r else ""
        lines.append(
            f"| {r['setting']} | {r['mode']} | {r['rival']} | {r['ms']:.2f} | {r['ratio']:.2f} | {r['gflops']:.1f} | "
            f"{r['gbytes']:.1f} | {saved} |"
        )
    return "\n".join(lines)


def plot(records: Sequence[dict[str, Any]], benchmark: Benchmark, path: Path) -> None:
    """Bars of time over ours, one panel a setting, for its last mode."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in records if "error" not in r]
    settings = list(dict.fromkeys(r["setting"] for r in timed))
    figure, axes = plt.subplots(
        1, len(settings), figsize=(4.5 * len(settings), 3.2), squeeze=False, layout="constrained"
    )
    for axis, setting in zip(axes[0], settings, strict=True):
        mode = [r["mode"] for r in timed if r["setting"] == setting][-1]
        rows = [r for r in timed if r["setting"] == setting and r["mode"] == mode]
        colours = ["#2f7d4f" if r["rival"] == benchmark.ours else "#9aa5a0" for r in rows]
        bars = axis.barh([r["rival"] for r in rows], [r["ratio"] for r in rows], color=colours)
        axis.bar_label(bars, [f"{r['ratio']:.2f}" for r in rows], padding=2, fontsize=8)
        axis.set(
            title=f"{setting}, {mode}",
            xlabel=f"time / {benchmark.ours}",
            xlim=(0, 1.15 * max(r["ratio"] for r in rows)),
        )
        axis.invert_yaxis()
    figure.suptitle(benchmark.title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def keep_freed_memory() -> None:
    """Make glibc's malloc reuse large blocks for all rivals alike.

    By default it returns them to the system, which then clears new pages inside the timed calls: for outputs of 25 MB
    that takes as long as the kernels, now and then. Blocks from 32 MB on are always returned.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, 2**25)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m grassland.kernels.bench", description=__doc__)
    parser.add_argument("op", choices=dispatch.PACKAGES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--setting", action="append", help="only this setting (repeatable)")
    parser.add_argument("--out", type=Path, help="folder for OP.jsonl, OP.md and OP.png; nothing is written without it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    benchmark: Benchmark = importlib.import_module(f"{__package__}.{options.op}.rivals").BENCHMARK
    settings = [s for s in benchmark.settings if not options.setting or s.id in options.setting]
    if not settings:
        names = ", ".join(s.id for s in benchmark.settings)
        raise SystemExit(f"error: --setting must be one of {names}, got {', '.join(options.setting)}")
    facts, records = about(), []
    for setting in settings:
        records += measure(benchmark, setting, options)
        print(f"{setting.id}: done", file=sys.stderr)
    text = table(records, benchmark.ours)
    print(f"{benchmark.title}\n\n{text}\n\n{json.dumps(facts)}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = f"{options.op}-{options.device}-{options.dtype}"
        lines = [json.dumps({**record, **facts}) for record in records]
        (options.out / f"{stem}.jsonl").write_text("\n".join(lines) + "\n")
        plot(records, benchmark, options.out / f"{stem}.png")
    return records


if __name__ == "__main__":
    # The builders raise the Unavailable of the imported module, which is not that of __main__.
    importlib.import_module(f"{__package__}.bench").main()
