"""Rivals set up and compared, before anything is timed."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import dispatch
from .rival import Benchmark, Disagreement, Rival, Setting, Step, Unavailable, summary, tensors, without_check

# Seconds of a set-up that is worth a line.
SLOW = 5.0


def build(
    benchmark: Benchmark, setting: Setting, dtype: torch.dtype, device: torch.device, setup_limit: float = 0.0
) -> tuple[dict, dict]:
    """The rivals' functions, and the reasons of those that cannot run. setup_limit: seconds, 0 for none."""
    from torch._dynamo.exc import BackendCompilerFailed

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
            if not late and not isinstance(error, Unavailable | dispatch.BackendError | BackendCompilerFailed):
                raise
            reasons[rival.name] = str(error).partition("\n")[0]
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
    """Largest relative difference, in the Euclidean norm, of corresponding tensors; NaN if one of them has a NaN."""
    pairs = zip(tensors(found), tensors(expected), strict=True)
    differences = [(a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30) for a, b in pairs]
    # Not Python's max, which forgets a NaN that does not come first.
    return torch.stack(differences).max().item()


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
