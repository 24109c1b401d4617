"""What is made of a benchmark's records: tables, pictures, and the comparison with an earlier run."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
TOLERANCE = 0.15


def table(records: Sequence[Record], ours: str) -> str:
    """Markdown: one row a rival, its time over ours in every setting."""
    lines = [
        f"| setting | mode | rival | ms | time / {ours} | GFLOP/s | GB/s | saved MB | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        if "error" in r:
            lines.append(f"| {r['setting']} | | {r['rival']} | not run: {r['error']} | | | | | |")
            continue
        saved = f"{r['saved_bytes'] / 1e6:.1f}" if r.get("saved_bytes") else ""
        lines.append(
            f"| {r['setting']} | {r['mode']} | {r['rival']} | {r['ms']:.2f} | {r['ratio']:.2f} | {r['gflops']:.1f} | "
            f"{r['gbytes']:.1f} | {saved} | {r['peak_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def bars(records: Sequence[Record], ours: str, title: str, path: Path) -> None:
    """Bars of time over ours, one panel a setting, for its last mode."""
    timed = last_modes(records)
    settings = list(dict.fromkeys(r["setting"] for r in timed))
    figure = new_figure(4.5 * len(settings), 3.2)
    for axis, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        rows = [r for r in timed if r["setting"] == setting]
        colours = [colour(r["rival"], ours) for r in rows]
        drawn = axis.barh([r["rival"] for r in rows], [r["ratio"] for r in rows], color=colours)
        axis.bar_label(drawn, [f"{r['ratio']:.2f}" for r in rows], padding=2, fontsize=8)
        axis.set(title=f"{setting}, {rows[0]['mode']}", xlabel=f"time / {ours}")
        axis.set_xlim(0, 1.15 * max(r["ratio"] for r in rows))
        axis.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def roofline(records: Sequence[Record], ours: str, title: str, path: Path) -> None:
    """GFLOP/s against FLOPs a byte that the operation cannot do without, under what the machine was measured to do.

    All rivals of a setting stand at one place of the x axis: they are charged the same work, whatever they really do.
    """
    timed = [r for r in last_modes(records) if r["gbytes"] > 0]
    figure = new_figure(6.4, 4.6)
    axis = figure.subplots()
    places = [r["gflops"] / r["gbytes"] for r in timed]
    top, bandwidth = timed[0]["peak_gflops"], timed[0]["peak_gbytes"]
    low, high = min([*places, top / bandwidth]) / 3, max([*places, top / bandwidth]) * 3
    axis.plot([low, top / bandwidth, high], [low * bandwidth, top, top], color="black", lw=1)
    axis.annotate(f"{bandwidth:.0f} GB/s copied, {top:.0f} GFLOP/s multiplied", (0.03, 0.95), xycoords="axes fraction")
    for place, r in zip(places, timed, strict=True):
        marked = r["rival"] == ours
        axis.plot(place, r["gflops"], "o" if marked else ".", color=colour(r["rival"], ours), zorder=3 if marked else 2)
        if marked:
            axis.annotate(r["setting"], (place, r["gflops"]), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="GFLOP/s", title=f"{title}: {ours} and rivals")
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)


def scaling(records: Sequence[Record], ours: str, title: str, axis_name: str, path: Path) -> None:
    """Time of every rival against the size that was varied."""
    timed = last_modes(records)
    figure = new_figure(6.8, 4.6)
    axis = figure.subplots()
    for rival in dict.fromkeys(r["rival"] for r in timed):
        rows = sorted((r[axis_name], r["ms"]) for r in timed if r["rival"] == rival)
        style = {"color": "#2f7d4f", "lw": 2.5} if rival == ours else {"lw": 1}
        axis.plot(*zip(*rows, strict=True), "o-", ms=3, label=rival, **style)
    axis.set(xscale="log", yscale="log", xlabel=axis_name, ylabel=f"ms, {timed[0]['mode']}", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


def read_baseline(path: Path) -> list[Record]:
    """The records of a stored JSONL. ValueError that names the file if it is none."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: not a benchmark's JSONL ({error})") from error


def regressions(
    records: Iterable[Record], baseline: Iterable[Record], ours: Collection[str], tolerance: float = TOLERANCE
) -> list[str]:
    """A line for each rival over which our lead, its time over ours, has shrunk by more than `tolerance`.

    Both times of a ratio come from one run, so a slower machine alone is no regression. ValueError if the two have no
    rival in common: ours, whose ratio is always 1, tells nothing.
    """
    before = leads(baseline, ours)
    pairs = [(key, now) for key, now in leads(records, ours).items() if key in before]
    if not pairs:
        raise ValueError("the baseline has no device, setting, mode and rival in common with this run")
    return [
        f"regression: {' | '.join(key)}: time / ours {before[key]:.3f} -> {now:.3f}, {before[key] / now:.2f}x slower"
        for key, now in pairs
        if before[key] > (1 + tolerance) * now
    ]


def uncompared(records: Sequence[Record], baseline: Sequence[Record], ours: Collection[str]) -> list[str]:
    """What a comparison says nothing of, a line each: rivals of a measured setting that one of the two did not time,
    settings that were not measured, another machine."""
    now, before = leads(records, ours), leads(baseline, ours)
    measured = {setting_of(r) for r in records}
    lines = [f"not in this run: {' | '.join(key)}" for key in before if key not in now and key[:4] in measured]
    lines += [f"not in the baseline: {' | '.join(key)}" for key in now if key not in before]
    left_out = dict.fromkeys(key[:4] for key in before if key[:4] not in measured)
    lines += [f"not in this run: {' | '.join(key)}" for key in left_out]
    here, there = (dict.fromkeys(place(r) for r in found if "ratio" in r) for found in (records, baseline))
    if here.keys() != there.keys():
        lines.append(f"another machine: the baseline is of {'; '.join(there)}, this run of {'; '.join(here)}")
    return lines


def leads(records: Iterable[Record], ours: Collection[str]) -> dict[tuple[str, ...], float]:
    """Every rival's time over ours, by device, setting, mode and rival."""
    return {
        (*setting_of(r), r["mode"], r["rival"]): r["ratio"] for r in records if "ratio" in r and r["rival"] not in ours
    }


def setting_of(record: Record) -> tuple[str, ...]:
    # Older records do not name the device.
    device = record.get("device", "cuda" if "graph" in record else "cpu")
    return (device, *(str(record[key]) for key in ("bench", "setting", "dtype")))


def place(record: Record) -> str:
    return ", ".join(str(record.get(key)) for key in ("cpu", "threads", "gpus"))


def last_modes(records: Sequence[Record]) -> list[Record]:
    """The timed records of each setting's last mode."""
    timed = [r for r in records if "error" not in r]
    modes = {r["setting"]: r["mode"] for r in timed}
    return [r for r in timed if r["mode"] == modes[r["setting"]]]


def colour(rival: str, ours: str) -> str:
    return "#2f7d4f" if rival == ours else "#9aa5a0"


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
